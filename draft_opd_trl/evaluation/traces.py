"""What verification said of a drafter along a text, as text: blocks, proposals, both models' probabilities.

Holds the record of one text and how it is computed. Does not know how a trace is shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..core.records import DraftBlocks, Rollout, slot_labels
from ..core.sampling import probabilities
from ..core.sampling_params import SamplingParams
from ..core.target import Target
from ..core.vocabulary import to_draft_ids
from ..decoding.replay import judging_states, replay_text
from ..drafters.base import Drafter


@dataclass
class TraceBlock:
    """
    One block: what was proposed, and what verification said.

    Args:
        position (`int`): Where the first proposal stands in the completion, whose first token is at 0.
        drafts (`list[str]`): Proposals inside the text.
        draft_probs, target_probs (`list[float]`): What drafter and target gave each proposal, after those before it.
        num_accepted (`int`): Length of the accepted run.
        choices (`list[str]`): The target's choice at each rejected slot: the token it committed instead, then, after
            the rejected proposals, its most likely token.
        choice_draft_probs, choice_target_probs (`list[float]`): What drafter and target gave each choice.
        bonus (`str`, *optional*): The token the target added when every proposal was accepted.
    """

    position: int
    drafts: list[str]
    draft_probs: list[float]
    target_probs: list[float]
    num_accepted: int
    choices: list[str]
    choice_draft_probs: list[float]
    choice_target_probs: list[float]
    bonus: str | None

    @property
    def committed(self) -> list[str]:
        """Tokens the block added to the text."""
        after = self.choices[:1] or ([] if self.bonus is None else [self.bonus])
        return self.drafts[: self.num_accepted] + after


@dataclass
class Trace:
    """
    One text as its blocks; `dataclasses.asdict` makes it JSON.

    Args:
        prompt (`str`): As the target read it, template and all.
        first (`str`): The completion's first token, which comes from the prefill.
        blocks (`list[TraceBlock]`): In text order.
    """

    prompt: str
    first: str
    blocks: list[TraceBlock]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trace:
        """A trace read back from what `dataclasses.asdict` made of it."""
        return cls(**{**values, "blocks": [TraceBlock(**block) for block in values["blocks"]]})

    @property
    def completion(self) -> str:
        return self.first + "".join(token for block in self.blocks for token in block.committed)

    @property
    def acceptance_length(self) -> float:
        return sum(len(block.committed) for block in self.blocks) / max(len(self.blocks), 1)


def token_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """
    Token id → the text it stands for, the same wherever it stands.

    Bytes that are no whole character, as byte-level vocabularies have them, are written `\\xe2`.
    """
    # Some decoders drop the space before the first token, so that each is read after another one.
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @cache
    def read(token: int) -> str:
        text = decode([*before, token])[len(decode(before)) :]
        if "\ufffd" not in text:
            return text
        name = tokenizer.convert_ids_to_tokens(token)
        fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
        if fallback:
            return bytes.fromhex(fallback[1]).decode(errors="backslashreplace")
        if set(name) <= byte_of.keys():
            return bytes(byte_of[letter] for letter in name).decode(errors="backslashreplace")
        return text

    return read


@torch.no_grad()
def trace_texts(
    target: Target,
    drafter: Drafter,
    rollout: Rollout,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingParams | None = None,
    batch_size: int = 16,
) -> list[Trace]:
    """
    Texts as their blocks: those of the rollout, or, where it has none, what the drafter would propose now.

    Args:
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        rollout ([`Rollout`]): Texts the target wrote.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        sampling ([`SamplingParams`], *optional*): The law the probabilities are read under. Greedy decoding knows no
            probabilities but 0 and 1, so at temperature 0 (the default) those at temperature 1 are shown.
        batch_size (`int`, *optional*, defaults to `16`): Texts read side by side.

    Returns:
        A [`Trace`] a text.
    """
    sampling = SamplingParams(1.0) if sampling is None or sampling.greedy else sampling
    read = token_reader(tokenizer)
    traces = []
    for start in range(0, len(rollout), batch_size):
        texts = rollout.part(start, min(start + batch_size, len(rollout)))
        blocks, choices, draft_probs, target_probs = _slot_probabilities(target, drafter, texts, sampling)
        completions = texts.completions()
        part = [
            Trace(tokenizer.decode(ids[:length]), read(completion[0]), [])
            for ids, length, completion in zip(
                texts.tokens.tolist(), texts.prompt_lengths.tolist(), completions, strict=True
            )
        ]
        columns = (
            blocks.texts,
            blocks.anchors - texts.prompt_lengths[blocks.texts],
            blocks.draft_tokens,
            blocks.num_accepted,
            blocks.num_valid,
            choices,
            draft_probs,
            target_probs,
        )
        for text, anchor, drafts, accepted, valid, chosen, by_drafter, by_target in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            after = completions[text][anchor + valid + 1 :] if accepted == valid else []
            part[text].blocks.append(
                TraceBlock(
                    position=anchor + 1,
                    drafts=[read(token) for token in drafts[:valid]],
                    draft_probs=[pair[0] for pair in by_drafter[:valid]],
                    target_probs=[pair[0] for pair in by_target[:valid]],
                    num_accepted=accepted,
                    choices=[read(token) for token in chosen[accepted:valid]],
                    choice_draft_probs=[pair[1] for pair in by_drafter[accepted:valid]],
                    choice_target_probs=[pair[1] for pair in by_target[accepted:valid]],
                    bonus=read(after[0]) if after else None,
                )
            )
        traces += part
    return traces


def _slot_probabilities(
    target: Target, drafter: Drafter, texts: Rollout, sampling: SamplingParams, chunk_size: int = 256
) -> tuple[DraftBlocks, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The blocks of the texts. The target's choice `(N, K)`: the text's token up to the first rejected slot, its most
    likely one after that. Then the drafter's and the target's probability `(N, K, 2)` of the proposal and that choice.
    """
    cache = target.new_cache(*texts.tokens.shape)
    features, states = target.forward_text(texts.tokens, drafter.target_layer_ids, cache)
    blocks = replay_text(drafter, texts, features) if texts.blocks is None else texts.blocks
    num_draft_tokens = blocks.num_draft_tokens
    slots = torch.arange(num_draft_tokens, device=blocks.texts.device)
    given = (slots <= blocks.num_accepted[:, None]).flatten()
    hidden = drafter.draft(features, texts.tokens, blocks).flatten(0, 1)
    states = judging_states(target, texts, blocks, states, cache).flatten(0, 1)
    drafts = blocks.draft_tokens.flatten()
    labels = slot_labels(texts.tokens, blocks.texts, blocks.anchors, num_draft_tokens).flatten()
    parts = []
    for start in range(0, max(len(drafts), 1), chunk_size):
        part = slice(start, start + chunk_size)
        target_probs = probabilities(target.logits(states[part]), sampling)
        choices = torch.where(given[part], labels[part], target_probs.argmax(-1))
        tokens = torch.stack([drafts[part], choices], dim=-1)
        draft_probs = probabilities(drafter.logits(hidden[part]), sampling)
        ids, inside = (tokens, True) if drafter.vocab_map is None else to_draft_ids(tokens, drafter.vocab_map)
        parts.append((choices, draft_probs.gather(-1, ids) * inside, target_probs.gather(-1, tokens)))
    found = (torch.cat(values).unflatten(0, (-1, num_draft_tokens)) for values in zip(*parts, strict=True))
    return blocks, *found
