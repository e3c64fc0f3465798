"""Texts that the target writes alone, with whatever cache its own model brings: for any causal LM of transformers.

What `speculate` without a drafter writes, for targets over which no cache of ours is exact. Knows no drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..core.records import Rollout
from ..core.sampling import draw_at, probabilities
from ..core.sampling_params import SamplingParams
from ..core.seeding import COMMIT, text_uniforms
from ..core.target import Target


# Takes a prompt's index, its completion, and the length of each block's accepted run.
OnText = Callable[[int, list[int], list[int]], None]


class Settings(Protocol):
    """What is read here of [`SpeculationSettings`]."""

    max_new_tokens: int
    stop_token_ids: Sequence[int]
    sampling: SamplingParams
    batch_size: int
    pad_token_id: int


def until_stop(completion: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """A completion up to its first stop token: nothing after it would ever be verified."""
    ends = [index for index, token in enumerate(completion) if token in stop_token_ids]
    return list(completion[: ends[0] + 1] if ends else completion)


class _OwnDraws(LogitsProcessor):
    """
    Leaves `generate` no choice: every token is the one that [`speculate`] would commit there.

    Args:
        sampling ([`SamplingParams`]): Shapes the distribution.
        seeds (`torch.LongTensor` of shape `(B,)`): One a text.
    """

    def __init__(self, sampling: SamplingParams, seeds: torch.Tensor) -> None:
        self.sampling, self.seeds = sampling, seeds

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.sampling.greedy:
            chosen = scores.argmax(-1)
        else:
            position = torch.full_like(self.seeds[:, None], input_ids.shape[1])
            uniforms = text_uniforms(self.seeds, position, COMMIT)[:, 0]
            chosen = draw_at(probabilities(scores, self.sampling), uniforms)
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen[:, None], 0.0)


@contextmanager
def _nothing_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's own generation settings: penalties and forced tokens would make it another text."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def write_alone(
    target: Target, prompts: Sequence[Sequence[int]], settings: Settings, seeds: Sequence[int]
) -> Iterator[tuple[int, list[int]]]:
    """
    Write a text for each prompt, one token at a time.

    Prompts of one length are decoded side by side, so that nothing is padded on the left: layers with a state of their
    own would read it.

    Args:
        target ([`Target`]): Writes.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        settings ([`SpeculationSettings`]): Lengths, stop tokens, distribution, texts side by side.
        seeds (`Sequence[int]`): One a prompt; see [`speculate`].

    Yields:
        `tuple[int, list[int]]`: A prompt's index and its completion, in no certain order.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    while order:
        length = len(prompts[order[0]])
        batch = [index for index in order[: settings.batch_size] if len(prompts[index]) == length]
        order = order[len(batch) :]
        ids = torch.tensor([list(prompts[index]) for index in batch], device=target.device)
        own_seeds = torch.tensor([seeds[index] for index in batch], device=target.device)
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=list(settings.stop_token_ids) or None,
            pad_token_id=settings.pad_token_id,
        )
        with _nothing_of_its_own(target.model):
            written = target.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([_OwnDraws(settings.sampling, own_seeds)]),
            )
        for index, completion in zip(batch, written[:, length:].tolist(), strict=True):
            yield index, until_stop(completion, settings.stop_token_ids)


def rollout_alone(
    target: Target,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    seeds: Sequence[int],
    on_round: Callable[[int, int, int], None] | None,
    on_text: OnText | None,
) -> Rollout:
    """[`write_alone`] as a [`Rollout`]; the rest as in [`speculate`], of which this is the way without a drafter."""
    texts: list[list[int]] = [[] for _ in prompts]
    committed = 0
    for finished, (index, completion) in enumerate(write_alone(target, prompts, settings, seeds), start=1):
        texts[index], committed = completion, committed + len(completion) - 1
        if on_text is not None:
            on_text(index, completion, [0] * (len(completion) - 1))
        if on_round is not None:
            on_round(finished, committed, committed)
    return Rollout.from_ids([list(prompt) for prompt in prompts], texts, settings.pad_token_id, target.device)
