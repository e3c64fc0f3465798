"""Which blocks of a text are trained on: those that verification exposed, random ones, and what is too many.

Draws places and indices. Knows no models, and not what a block teaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..core.checks import one_of, settle
from ..core.limits import LIMITS
from ..core.records import DraftBlocks, Rollout


# Where on-policy blocks start.
ANCHORS = ("exposed", "random")


@dataclass(frozen=True)
class OnPolicySettings:
    """
    Which blocks of a text the drafter drafts for training, and how they are found.

    Args:
        anchors (`str`): Where on-policy blocks start: `exposed`, at the anchors verification of the current drafter
            has, or `random`, at as many others (an ablation). Proposals are the drafter's in both.
        num_anchors (`int`): Most blocks trained on, a text, new or remembered.
        num_chains (`int`): Anchors of each text drafted at once while the exposed ones are found; speed only.
        replay_ratio (`float`): Texts drawn from the error buffer for each new one; a fraction is drawn by chance.
    """

    anchors: str = "exposed"
    num_anchors: int = 512
    num_chains: int = 8
    replay_ratio: float = 0.0

    def __post_init__(self) -> None:
        settle(self, LIMITS, anchors=one_of(*ANCHORS))


def random_anchors(length: int, prompt_length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `count` distinct anchors inside a completion, sorted; SFT drafts from these."""
    candidates = length - 1 - prompt_length
    chosen = torch.randperm(max(candidates, 0), generator=generator)[:count]
    return chosen.sort().values + prompt_length


def random_places(
    rollout: Rollout, texts: Iterable[int], count: int, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts and anchors `(N,)`: up to `count` [`random_anchors`] of each of `texts`, drawn by its generator."""
    lengths, prompt_lengths = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
    owners, anchors = [rollout.lengths[:0]], [rollout.lengths[:0]]
    for text in texts:
        drawn = random_anchors(lengths[text], prompt_lengths[text], count, generators[text])
        anchors.append(drawn.to(rollout.tokens.device))
        owners.append(torch.full_like(anchors[-1], text))
    return torch.cat(owners), torch.cat(anchors)


def choose_blocks(blocks: DraftBlocks, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of up to `count` blocks of one text: those with an error first, then others, drawn at random."""
    if len(blocks) <= count:
        return torch.arange(len(blocks), device=blocks.texts.device)
    keys = torch.rand(len(blocks), generator=generator).to(blocks.texts.device) - blocks.has_error.float()
    return keys.argsort()[:count].sort().values


def choose_in_each_text(blocks: DraftBlocks, count: int, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Indices that [`choose_blocks`] finds in each text, by its generator; blocks lie in text order."""
    sizes = torch.bincount(blocks.texts, minlength=len(generators)).tolist()
    parts = torch.arange(len(blocks), device=blocks.texts.device).split(sizes)
    return torch.cat(
        [
            part[choose_blocks(blocks.select(part), count, generator)]
            for part, generator in zip(parts, generators, strict=True)
        ]
    )
