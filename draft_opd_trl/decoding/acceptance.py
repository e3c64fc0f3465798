"""What verification said over a set of texts, counted: acceptance length, by slot, by position, with its spread.

Counts and nothing else. It does not know models, decoding or training state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch

from ..core.errors import InputError
from ..core.records import num_valid_slots


DEFINITION = (
    "τ: tokens committed per verification, the recovered or bonus token counted, over all prompts together. A text's "
    "first token comes from the prefill and counts in neither."
)
FIRST_POSITION_BIN = 32
# Of the bootstrap: draws of prompts, and what an interval covers.
RESAMPLES, LEVEL = 2000, 0.95


@dataclass
class AcceptanceReport:
    """
    What verification said, text by text; every number is derived from it.

    A block's accepted run says where the next block starts: one token after the run, that of the verification itself.
    So the runs of a text and its length are the whole record. A text that was decoded plainly is one with K = 0.

    Args:
        num_draft_tokens (`int`): K, proposals a block.
        completions (`list[list[int]]`): Token ids by prompt, stop token included.
        accepted (`list[list[int]]`): By prompt, the length of each block's accepted run inside the text, in order.
        stopped (`list[bool]`): By prompt, whether a stop token ended the text (else the length limit did).
        seconds (`float`): Wall time of decoding, prefill included.
        draft_seconds (`float`): Of these, in the drafter.
        verify_seconds (`float`): Of these, in the target, prefill included.
        replayed (`bool`): The blocks were counted by replay along texts that the target wrote alone, so that the times
            say nothing of speculation, and only the whole of them is told.
    """

    num_draft_tokens: int
    completions: list[list[int]] = field(repr=False)
    accepted: list[list[int]] = field(repr=False)
    stopped: list[bool] = field(repr=False)
    seconds: float
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    replayed: bool = False

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, texts: Sequence[int]) -> AcceptanceReport:
        """These texts, in this order; times stay those of all."""
        parts = ([part[text] for text in texts] for part in (self.completions, self.accepted, self.stopped))
        return replace(self, **dict(zip(("completions", "accepted", "stopped"), parts, strict=True)))

    @cached_property
    def _blocks(self) -> dict[str, torch.Tensor]:
        """All blocks `(N,)`: text, anchor (from the completion's start), tokens accepted, judged, committed."""
        sizes = torch.tensor([len(runs) for runs in self.accepted], dtype=torch.long)
        texts = torch.arange(len(sizes)).repeat_interleave(sizes)
        accepted = torch.tensor([run for runs in self.accepted for run in runs], dtype=torch.long)
        advanced = (accepted + 1).cumsum(0) - (accepted + 1)
        first_of_text = (sizes.cumsum(0) - sizes)[texts]
        anchors = advanced - advanced[first_of_text]
        lengths = torch.tensor([len(text) for text in self.completions], dtype=torch.long)
        return {
            "texts": texts,
            "anchors": anchors,
            "num_accepted": accepted,
            "num_valid": num_valid_slots(anchors, lengths[texts], self.num_draft_tokens),
            # The token after the run, unless the text ended with the run.
            "committed": torch.minimum(accepted + 1, lengths[texts] - 1 - anchors),
        }

    @cached_property
    def _ratios(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Each statistic as a ratio of sums over prompts: numerators and denominators `(B,)`, float64."""
        blocks, count = self._blocks, len(self)
        texts = blocks["texts"]

        def by_prompt(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.float64).index_add_(0, texts, values.double())

        ones = torch.ones_like(texts)
        committed, verifications = by_prompt(blocks["committed"]), by_prompt(ones)
        ratios = {
            "acceptance_length": (committed, verifications),
            # Some peers average the prompts' own lengths, so that a short text weighs as much as a long one.
            "acceptance_length_per_prompt": (committed / verifications.clamp(min=1), (verifications > 0).double()),
        }
        for slot in range(self.num_draft_tokens):
            accepted, valid = blocks["num_accepted"] > slot, blocks["num_valid"] > slot
            ratios[f"acceptance_slot_{slot + 1}"] = by_prompt(accepted), by_prompt(valid)
        for start, stop in self.position_bins:
            inside = (blocks["anchors"] >= start) & (blocks["anchors"] < stop)
            ratios[f"acceptance_length_from_{start}"] = by_prompt(blocks["committed"] * inside), by_prompt(inside)
        whole = blocks["num_accepted"] == blocks["num_valid"]
        ratios["blocks_fully_accepted"] = by_prompt(whole), verifications
        # A run that reaches the text's last token holds the stop token; otherwise verification wrote it.
        reaches = blocks["committed"] == blocks["num_accepted"]
        stopped = torch.tensor(self.stopped, dtype=torch.float64)
        ratios["stops_in_blocks"] = by_prompt(reaches) * stopped, stopped
        return ratios

    @property
    def position_bins(self) -> list[tuple[int, int]]:
        """Bins of anchors, in tokens from the completion's start: 0–31, 32–63, 64–127 and so on, doubling."""
        furthest = int(self._blocks["anchors"].max()) if len(self._blocks["texts"]) else -1
        bins, start, stop = [], 0, FIRST_POSITION_BIN
        while start <= furthest:
            bins.append((start, stop))
            start, stop = stop, 2 * stop
        return bins

    def statistic(self, name: str) -> float:
        """Any of those that [`metrics`] names, such as `blocks_fully_accepted`; 0 where there was nothing to count."""
        numerator, denominator = self._ratios[name]
        return float(numerator.sum() / denominator.sum().clamp(min=1))

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % interval of each statistic, by bootstrap over prompts ([`bootstrap_interval`])."""
        numerators, denominators = (torch.stack(part, dim=1) for part in zip(*self._ratios.values(), strict=True))
        values = resampled(numerators, denominators, RESAMPLES, seed=0)
        return {name: interval_of(one, LEVEL) for name, one in zip(self._ratios, values.T, strict=True)}

    @property
    def committed(self) -> list[int]:
        """Tokens that verifications committed, by prompt."""
        return self._ratios["acceptance_length"][0].long().tolist()

    @property
    def verifications(self) -> list[int]:
        """By prompt."""
        return [len(runs) for runs in self.accepted]

    @property
    def acceptance_length(self) -> float:
        """τ."""
        return self.statistic("acceptance_length")

    @property
    def acceptance_by_slot(self) -> list[float]:
        """Share of blocks whose first k proposals were all accepted, of those with k proposals in the text."""
        return [self.statistic(f"acceptance_slot_{slot}") for slot in range(1, self.num_draft_tokens + 1)]

    @property
    def tokens(self) -> int:
        """Completion tokens written."""
        return sum(len(text) for text in self.completions)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    def _timing(self) -> dict[str, float]:
        if self.replayed:
            return {"prompts": len(self)}
        return {
            "tokens_per_second": self.tokens_per_second,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
            "prompts": len(self),
        }

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """The numbers a Trainer logs, `<prefix>_…`; those of [`summary`]."""
        low, high = self.intervals["acceptance_length"]
        logged = {name: self.statistic(name) for name in self._ratios}
        logged |= {"acceptance_length_low": low, "acceptance_length_high": high, "runtime": self.seconds}
        return {f"{prefix}_{name}": value for name, value in (logged | self._timing()).items()}

    def summary(self) -> dict[str, Any]:
        """The numbers a results file wants, JSON-able: each statistic with its 95 % interval over prompts."""

        def entry(name: str) -> dict[str, Any]:
            return {"value": self.statistic(name), "interval": list(self.intervals[name])}

        slots = range(1, self.num_draft_tokens + 1)
        return {
            "acceptance_length": self.acceptance_length,
            "interval": list(self.intervals["acceptance_length"]),
            "acceptance_by_slot": self.acceptance_by_slot,
            "intervals_by_slot": [list(self.intervals[f"acceptance_slot_{slot}"]) for slot in slots],
            "acceptance_by_position": [
                {"start": start, "stop": stop, **entry(f"acceptance_length_from_{start}")}
                for start, stop in self.position_bins
            ],
            "acceptance_length_per_prompt": entry("acceptance_length_per_prompt"),
            "blocks_fully_accepted": entry("blocks_fully_accepted"),
            "stops_in_blocks": entry("stops_in_blocks"),
            "verifications": sum(self.verifications),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "replayed": self.replayed,
            **self._timing(),
        }


def join_reports(reports: Sequence[AcceptanceReport], at_once: bool = False) -> AcceptanceReport:
    """
    One report over the texts of several.

    Args:
        reports (`Sequence[AcceptanceReport]`): Of the same K, counted in the same way; at least one.
        at_once (`bool`, *optional*, defaults to `False`): They were taken at the same time, on several ranks, so that
            wall time is the slowest one's, not their sum.
    """
    add = max if at_once else sum
    joined: dict[str, Any] = {name: getattr(reports[0], name) for name in ("num_draft_tokens", "replayed")}
    for name in (one.name for one in fields(AcceptanceReport) if one.name not in joined):
        parts = [getattr(report, name) for report in reports]
        joined[name] = list(chain(*parts)) if isinstance(parts[0], list) else add(parts)
    return AcceptanceReport(**joined)


def resampled(numerators: torch.Tensor, denominators: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    """Ratios of sums `(resamples, M)`, float64, over prompts drawn with replacement, from `(B, M)` each."""
    count = len(numerators)
    draws = torch.Generator().manual_seed(seed)
    ratios = []
    for start in range(0, resamples, 100):  # the weights of all resamples at once would be resamples × prompts
        index = torch.randint(count, (min(100, resamples - start), count), generator=draws)
        ones = torch.ones(index.shape, dtype=torch.float64)
        weights = torch.zeros_like(ones).scatter_add_(1, index, ones)
        ratios.append((weights @ numerators) / (weights @ denominators).clamp(min=1e-9))
    return torch.cat(ratios)


def interval_of(values: torch.Tensor, level: float) -> tuple[float, float]:
    """Percentile interval of resampled values `(resamples,)`."""
    values, tail = values.sort().values, (1 - level) / 2
    return float(values[int(tail * len(values))]), float(values[min(int((1 - tail) * len(values)), len(values) - 1)])


def bootstrap_interval(
    first: AcceptanceReport,
    second: AcceptanceReport | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float]:
    """
    Percentile bootstrap over prompts of τ, or of the paired difference τ(first) − τ(second).

    Prompts are resampled, and both drafters are read on the same ones, so what prompts share cancels.

    Args:
        first ([`AcceptanceReport`]): A drafter's.
        second ([`AcceptanceReport`], *optional*): Another's over the same prompts, for the difference.
        resamples (`int`, *optional*, defaults to `2000`): How often the prompts are resampled.
        level (`float`, *optional*, defaults to `0.95`): Share of the resamples inside the interval.
        seed (`int`, *optional*, defaults to `0`): Of the resampling.

    Returns:
        Lower and upper end of the interval.

    Raises:
        `ValueError`: The reports are of different numbers of prompts.
    """
    if second is not None and len(second) != len(first):
        raise InputError(f"A paired difference needs the same prompts, not {len(first)} and {len(second)}.")
    reports = [first] if second is None else [first, second]
    # Both as columns of one resampling: the same prompts are drawn for both.
    pairs = [report._ratios["acceptance_length"] for report in reports]
    numerators, denominators = (torch.stack(part, dim=1) for part in zip(*pairs, strict=True))
    values = resampled(numerators, denominators, resamples, seed)
    return interval_of(values[:, 0] - (values[:, 1] if second is not None else 0), level)


def difference(first: AcceptanceReport, second: AcceptanceReport) -> dict[str, float]:
    """τ(first) − τ(second), paired by prompt, with its 95 % interval."""
    low, high = bootstrap_interval(first, second)
    return {"mean": first.acceptance_length - second.acceptance_length, "low": low, "high": high}


def speedup_interval(
    texts: Sequence[AcceptanceReport], plain: Sequence[AcceptanceReport], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """
    95 % percentile bootstrap over prompts of tokens a second over those of plain decoding.

    Args:
        texts, plain (`Sequence[AcceptanceReport]`): Of single texts decoded one after the other, the same prompts in
            the same order. Decoded side by side they share their seconds, and the interval would say nothing.
        resamples, seed (`int`): As in [`bootstrap_interval`].

    Returns:
        Lower and upper end. It covers the choice of prompts and jitter within the run, not what changes between runs.
    """
    sides = (texts, plain)
    tokens = torch.tensor([[float(report.tokens) for report in side] for side in sides], dtype=torch.float64)
    seconds = torch.tensor([[report.seconds for report in side] for side in sides], dtype=torch.float64)
    speeds = resampled(tokens.T, seconds.T, resamples, seed)
    return interval_of(speeds[:, 0] / speeds[:, 1], LEVEL)
