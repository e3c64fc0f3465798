"""Metrics for `evaluate`. Each stands alone in its folder, so that it can be pushed as a Space."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str = "acceptance_length") -> str:
    """The folder of a metric, for `evaluate.load`, which needs no network for it."""
    return str(Path(__file__).parent / name)
