"""Prompts → texts the target wrote, from any source. Knows no losses and no optimizer."""

from __future__ import annotations

import dataclasses

import torch

from .drafters.base import Drafter
from .records import Rollout
from .speculation import SpeculationSettings, speculate
from .target import Target


def write_texts(
    source: str,
    rows: list[dict],
    target: Target,
    drafter: Drafter | None,
    settings: SpeculationSettings,
    generator: torch.Generator | None = None,
) -> Rollout:
    """
    Texts for tokenised rows.

    Args:
        source (`str`): `speculation` (blocks are recorded on the way), `generate` (the target alone) or `dataset`
            (`completion_ids` of the rows, cut to `max_new_tokens`).
        rows (`list[dict]`): With `prompt_ids`.
        target ([`Target`]), drafter ([`Drafter`], *optional*): The pair.
        settings ([`SpeculationSettings`]): Law and lengths.
        generator (`torch.Generator`, *optional*): At temperature > 0.

    Returns:
        [`Rollout`] on the target's device, in the order of `rows`.
    """
    prompts = [row["prompt_ids"] for row in rows]
    if source == "dataset":
        completions = [row["completion_ids"][: settings.max_new_tokens] for row in rows]
        return Rollout.from_ids(prompts, completions, settings.pad_token_id, target.device)
    if source == "generate":
        return speculate(target, None, prompts, dataclasses.replace(settings, keep_states=False), generator)
    return speculate(target, drafter, prompts, settings, generator)
