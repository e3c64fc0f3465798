"""Acceptance length by real speculative decoding, by slot, with its spread over prompts. Knows no training state."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from .drafters.base import Drafter
from .records import Rollout
from .speculation import SpeculationSettings, speculate
from .target import Target


@dataclass
class AcceptanceReport:
    """
    What verification said over a set of prompts.

    Acceptance length τ is tokens committed per verification, the recovered or bonus token counted. A text's first
    token comes from the prefill and counts in neither.

    Args:
        committed, verifications (`list[int]`): By prompt.
        accepted_by_slot, valid_by_slot (`list[int]`): Blocks whose slot k was accepted, and that had a slot k.
        seconds (`float`): Wall time of decoding, prefill included.
        tokens (`int`): Completion tokens written.
        completions (`list[list[int]]`): Token ids.
    """

    committed: list[int]
    verifications: list[int]
    accepted_by_slot: list[int]
    valid_by_slot: list[int]
    seconds: float
    tokens: int
    completions: list[list[int]] = field(repr=False)

    @property
    def acceptance_length(self) -> float:
        return sum(self.committed) / max(sum(self.verifications), 1)

    @property
    def acceptance_by_slot(self) -> list[float]:
        """Share of blocks whose first k proposals were all accepted, for k = 1 … K."""
        return [
            accepted / max(valid, 1) for accepted, valid in zip(self.accepted_by_slot, self.valid_by_slot, strict=True)
        ]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """The numbers a Trainer logs, `<prefix>_…`."""
        logged = {
            f"{prefix}_acceptance_length": self.acceptance_length,
            f"{prefix}_tokens_per_second": self.tokens_per_second,
            f"{prefix}_runtime": self.seconds,
            f"{prefix}_prompts": len(self.committed),
        }
        for slot, share in enumerate(self.acceptance_by_slot, start=1):
            logged[f"{prefix}_acceptance_slot_{slot}"] = share
        return logged

    def summary(self) -> dict[str, Any]:
        """The numbers a results file wants."""
        return {
            "acceptance_length": self.acceptance_length,
            "acceptance_by_slot": self.acceptance_by_slot,
            "prompts": len(self.committed),
            "verifications": sum(self.verifications),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def report_of(rollout: Rollout, seconds: float) -> AcceptanceReport:
    """The report of texts that speculation wrote."""
    blocks = rollout.blocks
    verifications = torch.bincount(blocks.rows, minlength=len(rollout))
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.rows.device)
    return AcceptanceReport(
        committed=torch.where(verifications > 0, rollout.completion_lengths - 1, 0).tolist(),
        verifications=verifications.tolist(),
        accepted_by_slot=(slots < blocks.num_accepted[:, None]).sum(0).tolist(),
        valid_by_slot=(slots < blocks.num_valid[:, None]).sum(0).tolist(),
        seconds=seconds,
        tokens=int(rollout.completion_lengths.sum()),
        completions=rollout.completions(),
    )


def merge_reports(reports: list[AcceptanceReport]) -> AcceptanceReport:
    """One report over the prompts of several ranks; its wall time is the slowest rank's."""
    return AcceptanceReport(
        committed=[value for report in reports for value in report.committed],
        verifications=[value for report in reports for value in report.verifications],
        accepted_by_slot=[sum(values) for values in zip(*(r.accepted_by_slot for r in reports), strict=True)],
        valid_by_slot=[sum(values) for values in zip(*(r.valid_by_slot for r in reports), strict=True)],
        seconds=max(report.seconds for report in reports),
        tokens=sum(report.tokens for report in reports),
        completions=[text for report in reports for text in report.completions],
    )


def measure_acceptance(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    generator: torch.Generator | None = None,
    progress: str | None = None,
) -> AcceptanceReport:
    """
    Decode `prompts` speculatively and report what verification said.

    Args:
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        settings ([`SpeculationSettings`]): Law and lengths; must be those the drafter will serve under.
        generator (`torch.Generator`, *optional*): At temperature > 0.
        progress (`str`, *optional*): Label of a progress bar with throughput and acceptance length.
    """
    start = time.perf_counter()
    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:

        def on_round(finished: int, committed: int, verifications: int) -> None:
            if finished > bar.n:
                speed = committed / (time.perf_counter() - start)
                bar.set_postfix_str(f"τ {committed / verifications:.2f}, {speed:.0f} tok/s", refresh=False)
                bar.update(finished - bar.n)

        rollout = speculate(target, drafter, prompts, settings, generator, on_round)
    return report_of(rollout, time.perf_counter() - start)


def bootstrap_interval(
    first: AcceptanceReport,
    second: AcceptanceReport | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile bootstrap over prompts of τ, or of the paired difference τ(first) − τ(second).

    Prompts are resampled, and both drafters are read on the same ones, so what prompts share cancels.

    Returns:
        Lower and upper end of the interval.

    Raises:
        `ValueError`: The reports are of different numbers of prompts.
    """
    count = len(first.committed)
    if second is not None and len(second.committed) != count:
        raise ValueError(f"A paired difference needs the same prompts, not {count} and {len(second.committed)}.")
    draws = random.Random(seed)

    def tau(report: AcceptanceReport, index: list[int]) -> float:
        committed, verifications = report.committed, report.verifications
        return sum(committed[i] for i in index) / max(sum(verifications[i] for i in index), 1)

    values = []
    for _ in range(resamples):
        index = draws.choices(range(count), k=count)
        values.append(tau(first, index) - (tau(second, index) if second is not None else 0.0))
    values.sort()
    tail = (1 - level) / 2
    return values[int(tail * resamples)], values[min(int((1 - tail) * resamples), resamples - 1)]
