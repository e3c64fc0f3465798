"""Acceptance length without speculative decoding: the target writes its texts alone, and replay counts.

At temperature 0 the counts are those of speculation, block for block; above, they have the same distribution. For
targets over which speculation is slow. Knows no training state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core.records import Rollout
from ..core.seeding import ACCEPT, PROPOSE, text_uniforms
from ..core.target import Target
from ..decoding.acceptance import AcceptanceReport, join_reports
from ..decoding.coupling import Coupling
from ..decoding.replay import replay_text
from ..decoding.speculation import SpeculationSettings, speculate
from ..drafters.base import Drafter


# Prompts and a seed of each → the target's texts, whoever writes them down.
Writer = Callable[[Sequence[Sequence[int]], Sequence[int]], Rollout]


@torch.no_grad()
def measure_by_replay(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    seeds: Sequence[int],
    progress: str | None = None,
    on_text: Callable[[int, AcceptanceReport], None] | None = None,
    write: Writer | None = None,
    known: dict[Any, Rollout] | None = None,
) -> AcceptanceReport:
    """
    What speculation would report over `prompts`, times excepted.

    Args:
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        settings ([`SpeculationSettings`]): Distribution and lengths; `batch_size` texts are written and read at once.
        seeds (`Sequence[int]`): One a prompt; see [`speculate`].
        progress (`str`, *optional*): Label of a progress bar with acceptance length.
        on_text (`Callable`, *optional*): Called with a prompt's index and the report of its text alone.
        write (`Callable`, *optional*): Prompts and seeds → all their texts at once ([`Rollout`]), such as a server's;
            by default the target writes them here, a batch at a time.
        known (`dict`, *optional*): Batches that the target wrote here for other drafters under the same settings; what
            is not there is added.
    """
    known = {} if known is None else known
    texts = None if write is None else write(prompts, seeds)
    reports: list[AcceptanceReport] = []
    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:
        for first in range(0, len(prompts), settings.batch_size):
            part = slice(first, first + settings.batch_size)
            began = time.perf_counter()
            if texts is None:
                batch = (tuple(map(tuple, prompts[part])), tuple(seeds[part]))
                if batch not in known:
                    known[batch] = speculate(target, None, prompts[part], settings, seeds=seeds[part])
                rollout = known[batch]
            else:
                rollout = texts.part(first, min(part.stop, len(texts)))
            found = replay_along(target, drafter, rollout, settings, seeds[part])
            seconds = (time.perf_counter() - began) / len(found)
            for text, (completion, accepted) in enumerate(found, start=first):
                stopped = completion[-1] in settings.stop_token_ids
                one = AcceptanceReport(
                    drafter.num_draft_tokens, [completion], [accepted], [stopped], seconds, replayed=True
                )
                reports.append(one)
                if on_text is not None:
                    on_text(text, one)
            bar.set_postfix_str(f"τ {join_reports(reports).acceptance_length:.2f}", refresh=False)
            bar.update(len(found))
    return join_reports(reports)


@torch.no_grad()
def replay_along(
    target: Target,
    drafter: Drafter,
    rollout: Rollout,
    settings: SpeculationSettings,
    seeds: Sequence[int],
    layers: Sequence[int] | None = None,
) -> list[tuple[list[int], list[int]]]:
    """
    Each text's completion, and the accepted run of each of its blocks, in order.

    Args:
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        rollout ([`Rollout`]): Texts of this target, whoever wrote them down.
        settings ([`SpeculationSettings`]): Their distribution, and whether proposals are drawn.
        seeds (`Sequence[int]`): One a text.
        layers (`Sequence[int]`, *optional*): Layers that the drafter is given instead of those it was trained on.
    """
    features, states = target.forward_text(rollout.tokens, drafter.target_layer_ids if layers is None else layers)
    coupling = None
    if settings.sample_proposals and not settings.sampling.greedy:
        coupling = Coupling(target, states, settings.sampling, _uniforms(rollout, drafter.num_draft_tokens, seeds))
    blocks = replay_text(drafter, rollout, features, coupling=coupling, judge_only=True)
    runs: list[list[int]] = [[] for _ in range(len(rollout))]
    for text, accepted in zip(blocks.texts.tolist(), blocks.num_accepted.tolist(), strict=True):
        runs[text].append(accepted)
    return list(zip(rollout.completions(), runs, strict=True))


def _uniforms(rollout: Rollout, num_draft_tokens: int, seeds: Sequence[int]) -> torch.Tensor:
    """`(B, T, K, 2)`: of each anchor and slot, from the text's own seed."""
    device, length = rollout.tokens.device, rollout.tokens.shape[1]
    places = torch.arange(length * num_draft_tokens, device=device).expand(len(rollout), -1)
    own = torch.tensor(list(seeds), device=device)
    parts = [text_uniforms(own, places, purpose) for purpose in (PROPOSE, ACCEPT)]
    return torch.stack(parts, dim=-1).view(len(rollout), length, num_draft_tokens, 2).float()
