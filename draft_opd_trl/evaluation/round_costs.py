"""What a round of speculation takes on this machine, timed, and so how many proposals to serve with.

Knows no training state and no engines: the loop that is timed is this package's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice

import torch

from ..core.errors import InputError
from ..core.stopwatch import Stopwatch
from ..core.target import Target
from ..decoding.speculation import Lanes, SpeculationSettings, commit, prefill, propose, verify
from ..drafters.base import Drafter
from .best_k import Choice, choices


# Rounds of a measurement, and those before it that warm up.
ROUNDS, WARM_UP = 10, 2


def check_timed(target: Target, batch_sizes: Sequence[int]) -> None:
    """
    Raises:
        `ValueError`: Rounds are to be timed, and over this target they say nothing of an engine's.
    """
    if batch_sizes and target.reads_anew is not None:
        raise InputError(
            f"serve_batch_sizes={list(batch_sizes)} asks for rounds to be timed, but over this target every round "
            "reads its texts anew, as no engine would. Leave it out."
        )


@torch.no_grad()
def round_seconds(
    target: Target, drafter: Drafter | None, prompts: Sequence[Sequence[int]], settings: SpeculationSettings
) -> float:
    """
    Seconds of a round in which every text proposes, verifies and commits: the least of a few, as whatever else the
    machine does only adds.

    Args:
        target ([`Target`]), drafter ([`Drafter`], *optional*): Bound to each other; without one a round is a token.
        prompts (`Sequence[Sequence[int]]`): The batch, token ids; texts begin behind them.
        settings ([`SpeculationSettings`]): The law. Lengths, stop tokens and `batch_size` are set aside.
    """
    rounds = ROUNDS + WARM_UP
    longest = max(map(len, prompts))
    num_draft_tokens = 0 if drafter is None else drafter.num_draft_tokens
    # Nothing ends meanwhile.
    settings = replace(settings, max_new_tokens=(num_draft_tokens + 1) * (rounds + 1), stop_token_ids=[])
    lanes = Lanes(target, drafter, settings, len(prompts), longest)
    padded = torch.tensor([[*prompt, *[settings.pad_token_id] * (longest - len(prompt))] for prompt in prompts])
    sizes = torch.tensor([len(prompt) for prompt in prompts])
    index = torch.arange(len(prompts))
    prefill(lanes, *(part.to(target.device) for part in (index, padded, sizes, index)))
    stopwatch, seconds = Stopwatch(target.device), []
    for _ in range(rounds):
        with stopwatch.measure("round"):
            proposals = propose(lanes, int(lanes.lengths.max()))
            commit(lanes, proposals, verify(lanes, proposals))
        seconds.append(stopwatch.read()["round"])
    return min(seconds[WARM_UP:])


@contextmanager
def proposing(drafter: Drafter, num_draft_tokens: int) -> Iterator[Drafter]:
    """The drafter with fewer proposals a block for a while; only where its config says that it has [`free_length`]."""
    own = drafter.config.num_draft_tokens
    drafter.config.num_draft_tokens = num_draft_tokens
    try:
        yield drafter
    finally:
        drafter.config.num_draft_tokens = own


def serving_choices(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    by_slot: Sequence[float],
    batch_sizes: Sequence[int],
) -> dict[int, list[Choice]]:
    """
    What serving with each K comes to, at each batch size; see [`choices`].

    Args:
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        prompts (`Sequence[Sequence[int]]`): What batches are made of, again from the first where they are too few.
        settings ([`SpeculationSettings`]): The law.
        by_slot (`Sequence[float]`): Shares of blocks whose first k proposals were all accepted, as measured.
        batch_sizes (`Sequence[int]`): To tell of.

    Returns:
        By batch size: decoding without the drafter, and each K that an engine may be told of it.
    """
    own = drafter.num_draft_tokens
    told = {}
    for size in batch_sizes:
        batch = list(islice(cycle(prompts), size))
        seconds = {0: round_seconds(target, None, batch, settings)}
        if drafter.config.free_length:
            for k in range(1, own):
                with proposing(drafter, k):
                    seconds[k] = round_seconds(target, drafter, batch, settings)
        seconds[own] = round_seconds(target, drafter, batch, settings)
        told[size] = choices(by_slot, seconds)
    return told
