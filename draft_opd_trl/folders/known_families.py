"""What a family of models was found to be good for as a target, when all of transformers' were built tiny and tried.

The table beside this file is written by `examples/families.py`. It says what was tried with one version of
transformers; what a target can do is found out anew when it is loaded.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..core.errors import InputError


FILE = Path(__file__).with_suffix(".json")


@functools.cache
def known_families() -> Mapping[str, Any]:
    """`transformers` (version), `reads` (what a round of speculation reads → families), `lacks`, `refused`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def told_of_family(family: str) -> str:
    """
    In a sentence, what was found.

    Args:
        family (`str`): `model_type` of the config of the language model.
    """
    known = known_families()
    tried = f"tried tiny and at random with transformers {known['transformers']}"
    if family in known["refused"]:
        return f"{family}, {tried}, is refused: {known['refused'][family]}"
    reads = next((reads for reads, families in known["reads"].items() if family in families.split()), None)
    if reads is None:
        return f"{family} is not among the families that were {tried}; what it can do shows when it is loaded"
    lacks = known["lacks"].get(family, {})
    without = "".join(f"; no {use} ({said})" for use, said in lacks.items())
    return f"{family}, {tried}: a round of speculation reads {reads}{without or '; every use works'}"


def check_family(config: PreTrainedConfig) -> None:
    """
    Refuse before weights are read what the same version of transformers was seen to make no target of.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of the whole model.

    Raises:
        `ValueError`: Its family cannot be a target.
    """
    known, family = known_families(), config.model_type
    own = type(config).__module__.startswith("transformers.")
    if own and known["transformers"] == transformers.__version__ and family in known["refused"]:
        raise InputError(f"{known['refused'][family]} (Found when {family} was tried, tiny.)")
