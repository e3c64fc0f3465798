"""What passes between rooms: texts, drafted blocks, and the batch a training step sees.

Holds shapes and nothing else. It does not know how any field was computed.

Symbols: B texts, T positions, N drafted blocks (packed over texts), K proposals a block, H target hidden size,
F width of the tapped features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch


def _map_tensors(record: Any, function: Any) -> Any:
    changes = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, torch.Tensor) or hasattr(value, "to"):
            changes[field.name] = function(value)
    return replace(record, **changes)


def num_valid_slots(anchors: torch.Tensor, lengths: torch.Tensor, num_draft_tokens: int) -> torch.Tensor:
    """Slots of a block that lie inside its text: `min(K, length - 1 - anchor)`."""
    return (lengths - 1 - anchors).clamp(max=num_draft_tokens)


def slot_labels(
    tokens: torch.Tensor, texts: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int
) -> torch.Tensor:
    """Text tokens at the K slots after each anchor: `(N, K)`; slots outside the tensor repeat its last column."""
    slots = torch.arange(1, num_draft_tokens + 1, device=tokens.device)
    return tokens[texts[:, None], (anchors[:, None] + slots).clamp(max=tokens.shape[1] - 1)]


@dataclass
class DraftBlocks:
    """
    The one record of what was proposed and what verification said.

    Args:
        texts (`torch.LongTensor` of shape `(N,)`):
            Text each block belongs to.
        anchors (`torch.LongTensor` of shape `(N,)`):
            Position of the last committed token when the block was drafted (slot 0 of the block).
        draft_tokens (`torch.LongTensor` of shape `(N, K)`):
            Proposals for positions `anchor + 1 … anchor + K`, as target token ids.
        num_accepted (`torch.LongTensor` of shape `(N,)`):
            Length of the accepted run, never above `num_valid`.
        num_valid (`torch.LongTensor` of shape `(N,)`):
            Proposals that verification could judge: `min(K, length - 1 - anchor)`, since text may end inside a block.
    """

    texts: torch.Tensor
    anchors: torch.Tensor
    draft_tokens: torch.Tensor
    num_accepted: torch.Tensor
    num_valid: torch.Tensor

    def __len__(self) -> int:
        return self.texts.shape[0]

    @property
    def num_draft_tokens(self) -> int:
        return self.draft_tokens.shape[1]

    @property
    def has_error(self) -> torch.Tensor:
        """`(N,)` bool: verification rejected a proposal of this block."""
        return self.num_accepted < self.num_valid

    @property
    def error_positions(self) -> torch.Tensor:
        """`(N,)`: where the first rejected proposal stood; only meaningful where `has_error`."""
        return self.anchors + self.num_accepted + 1

    def select(self, index: torch.Tensor) -> DraftBlocks:
        """Blocks at `index` (long or bool), in that order."""
        if index.dtype == torch.bool:  # once: a mask would be counted, and waited for, in every field
            index = index.nonzero()[:, 0]
        return DraftBlocks(*(getattr(self, field.name)[index] for field in fields(self)))

    def sorted(self) -> DraftBlocks:
        """Blocks by text, then by anchor."""
        stride = int(self.anchors.max()) + 1 if len(self) else 1
        return self.select(torch.argsort(self.texts * stride + self.anchors))

    def text_states(self, states: torch.Tensor) -> torch.Tensor:
        """Of states `(B, T, H)` of the texts, those from which each slot's *text* token is predicted: `(N, K, H)`."""
        slots = torch.arange(self.num_draft_tokens, device=self.texts.device)
        return states[self.texts[:, None], (self.anchors[:, None] + slots).clamp(max=states.shape[1] - 1)]

    def to(self, device: torch.device | str) -> DraftBlocks:
        return _map_tensors(self, lambda tensor: tensor.to(device))

    @classmethod
    def empty(cls, num_draft_tokens: int, device: torch.device | str = "cpu") -> DraftBlocks:
        index = torch.zeros(0, dtype=torch.long, device=device)
        return cls(index, index, index.new_zeros((0, num_draft_tokens)), index, index)

    @classmethod
    def cat(cls, blocks: list[DraftBlocks]) -> DraftBlocks:
        return cls(*(torch.cat([getattr(part, field.name) for part in blocks]) for field in fields(cls)))


@dataclass
class Rollout:
    """
    Texts the target wrote, and, where speculation wrote them, the blocks that verification judged.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`):
            Prompt and completion, right-padded.
        prompt_lengths (`torch.LongTensor` of shape `(B,)`):
            Tokens of the prompt; the completion starts at this position.
        lengths (`torch.LongTensor` of shape `(B,)`):
            Tokens of prompt and completion.
        blocks (`DraftBlocks`, *optional*):
            Blocks drafted while the text was written, in text order.
        block_states (`torch.Tensor` of shape `(N, K, H)`, *optional*):
            Target states before the head that judged each slot, given the *drafted* prefix, kept from verification.
    """

    tokens: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    blocks: DraftBlocks | None = None
    block_states: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def completion_lengths(self) -> torch.Tensor:
        return self.lengths - self.prompt_lengths

    def to(self, device: torch.device | str) -> Rollout:
        return _map_tensors(self, lambda value: value.to(device))

    def part(self, start: int, stop: int) -> Rollout:
        """Texts `start … stop - 1` with their blocks, trimmed to the longest of them."""
        lengths = self.lengths[start:stop]
        part = Rollout(self.tokens[start:stop, : int(lengths.max())], self.prompt_lengths[start:stop], lengths)
        if self.blocks is not None:
            chosen = (self.blocks.texts >= start) & (self.blocks.texts < stop)
            part.blocks = self.blocks.select(chosen)
            part.blocks.texts = part.blocks.texts - start
            if self.block_states is not None:
                part.block_states = self.block_states[chosen]
        return part

    def completions(self) -> list[list[int]]:
        """Completion token ids, a list a text, stop token included."""
        return [
            text[start:stop]
            for text, start, stop in zip(
                self.tokens.tolist(), self.prompt_lengths.tolist(), self.lengths.tolist(), strict=True
            )
        ]

    @classmethod
    def cat(cls, parts: list[Rollout]) -> Rollout:
        """Texts of several rollouts under each other, padded to the longest; blocks are not carried over."""
        width = max(part.tokens.shape[1] for part in parts)
        pad = torch.nn.functional.pad
        return cls(
            torch.cat([pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )

    @classmethod
    def from_ids(
        cls, prompts: list[list[int]], completions: list[list[int]], pad_token_id: int = 0, device: Any = "cpu"
    ) -> Rollout:
        """Texts given as token ids."""
        texts = [torch.tensor(p + c, dtype=torch.long) for p, c in zip(prompts, completions, strict=True)]
        return cls(
            torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad_token_id).to(device),
            torch.tensor([len(prompt) for prompt in prompts], device=device),
            torch.tensor([len(text) for text in texts], device=device),
        )


@dataclass
class ReplayBatch:
    """
    What one micro-step trains on.

    Args:
        tokens (`torch.LongTensor` of shape `(B, T)`):
            Texts, right-padded.
        lengths (`torch.LongTensor` of shape `(B,)`):
            Tokens of each.
        features (`torch.Tensor` of shape `(B, T, F)`):
            Tapped target states.
        blocks (`DraftBlocks`):
            Blocks to draft with gradients.
        states (`torch.Tensor` of shape `(B, T, H)`):
            Target states of the texts, before the head.
        draft_states (`torch.Tensor` of shape `(N, K, H)`, *optional*):
            The same at each slot, given the *drafted* prefix; meaningful where `rejected_weights` is positive.
        accepted_weights, rejected_weights (`torch.Tensor` of shape `(N, K)`):
            Weight of each slot in each stream, 0 where it is not in the stream.
        denominator (`torch.Tensor`, scalar):
            Sum of both weights over the global batch of the optimizer step.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    features: torch.Tensor
    blocks: DraftBlocks
    states: torch.Tensor
    draft_states: torch.Tensor | None
    accepted_weights: torch.Tensor
    rejected_weights: torch.Tensor
    denominator: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        """`(N, K)`: text tokens at each slot; what stands outside the text carries no weight."""
        return slot_labels(self.tokens, self.blocks.texts, self.blocks.anchors, self.blocks.num_draft_tokens)

    @property
    def text_states(self) -> torch.Tensor:
        """`(N, K, H)`: target states given the *text* before each slot; gathered only by losses that read them."""
        return self.blocks.text_states(self.states)
