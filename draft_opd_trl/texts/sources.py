"""Rows of prompts → texts the target wrote: read from the data set, written here, or read from disk.

A source is an object with one method, `write`. Knows no servers, no losses and no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from ..core.records import Rollout
from ..core.seeding import seed_of
from ..core.target import Target
from ..decoding.plain import until_stop
from ..decoding.speculation import SpeculationSettings, speculate
from ..drafters.base import Drafter
from .text_cache import TextCache


# Takes a metric's name, and how many of how many: who logs adds them up before dividing.
Log = Callable[[str, int, int], None]


def prompts_of(rows: list[dict]) -> list[list[int]]:
    """Token ids of the prompts of tokenised rows."""
    return [row["prompt_ids"] for row in rows]


class RolloutSource(Protocol):
    """Where texts come from."""

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """
        Texts for tokenised rows.

        Args:
            rows (`list[dict]`): With `prompt_ids` (and `completion_ids`, if those are what is read).
            draw (`int`, *optional*, defaults to `0`): At temperature > 0 each draw of a prompt is another text.

        Returns:
            [`Rollout`] on the target's device, in the order of `rows`.
        """


class DatasetSource:
    """Reads `completion_ids`, cut where decoding would have ended: at `max_new_tokens` or the first stop token."""

    def __init__(self, target: Target, settings: SpeculationSettings) -> None:
        self.target, self.settings = target, settings

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        settings = self.settings
        completions = [
            until_stop(row["completion_ids"][: settings.max_new_tokens], settings.stop_token_ids) for row in rows
        ]
        return Rollout.from_ids(prompts_of(rows), completions, settings.pad_token_id, self.target.device)


class DecodingSource:
    """
    The target writes in this process: sped up by a drafter, whose blocks are recorded on the way, or alone.

    A text depends on the seed, the draw and its prompt alone, so a resumed run continues with the same texts.
    """

    def __init__(self, target: Target, drafter: Drafter | None, settings: SpeculationSettings, seed: int) -> None:
        self.target, self.drafter, self.seed = target, drafter, seed
        self.settings = settings if drafter is not None else replace(settings, keep_states=False)

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        prompts = prompts_of(rows)
        seeds = [seed_of(self.seed, draw, prompt) for prompt in prompts]
        return speculate(self.target, self.drafter, prompts, self.settings, seeds=seeds)


class CachedSource:
    """
    Reads texts from disk, and asks another source only for those that are not there.

    A text that is just written may come with blocks and states, and one from disk does not, which differ in their last
    bits from those found again. So a run that goes on from a checkpoint writes once more what it wrote after it.

    Args:
        source ([`RolloutSource`]): Writes what is missing.
        cache ([`TextCache`]): Keeps it.
        log (`Callable`): Takes a metric's name, and how many of how many.
        pad_token_id (`int`), device (`torch.device`): For texts that are read.
    """

    def __init__(
        self,
        source: RolloutSource,
        cache: TextCache,
        log: Log,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        self.source, self.cache, self.log = source, cache, log
        self.pad_token_id, self.device = pad_token_id, device

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """See [`RolloutSource`]. Texts come with blocks only if all of them were just written by speculation."""
        prompts = prompts_of(rows)
        texts = self.cache.find(prompts, draw)
        missing = [index for index, text in enumerate(texts) if text is None]
        self.log("rollout/cached", len(rows) - len(missing), len(rows))
        if missing:
            rollout = self.source.write([rows[index] for index in missing], draw)
            written = rollout.completions()
            self.cache.add([prompts[index] for index in missing], written, draw)
            if len(missing) == len(rows):
                return rollout
            for index, text in zip(missing, written, strict=True):
                texts[index] = text
        return Rollout.from_ids(prompts, texts, self.pad_token_id, self.device)

    def fill(self, rows: list[dict], draw: int = 0) -> None:
        """Have those texts written that are not there, to be read later."""
        texts = self.cache.find(prompts_of(rows), draw)
        missing = [row for row, text in zip(rows, texts, strict=True) if text is None]
        if missing:
            self.cache.add(prompts_of(missing), self.source.write(missing, draw).completions(), draw)

    def state_dict(self) -> dict:
        """What a run that goes on from a checkpoint must know, as plain values."""
        return {"last_shard": self.cache.last_shard()}

    def load_state_dict(self, state: dict) -> None:
        if isinstance(self.source, DecodingSource) and self.source.drafter is not None:
            self.cache.forget_after(state["last_shard"])
