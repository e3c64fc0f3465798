"""What stands in for a target's cache where none is exact: the tokens of the texts, so that they are read anew.

Layers with a state of their own (linear attention, Mamba, convolutions), or with an attention that takes no masks,
cannot take back a token. But right padding is harmless to anything causal, so a forward over the whole text says of
every position what a cache would. It costs a text's length a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import InputError
from .records import DraftBlocks


# Texts that are read side by side to score a block each; bounds memory.
BLOCKS_READ_AT_ONCE = 8


class TextStore:
    """
    The tokens of the texts that are decoded side by side, each at its position.

    Args:
        num_lanes (`int`): Texts held side by side.
        max_length (`int`): Positions a lane can hold.
        device (`torch.device`): The target's.
    """

    def __init__(self, num_lanes: int, max_length: int, device: torch.device) -> None:
        self.max_length = max_length
        self.tokens = torch.zeros((num_lanes, max_length), dtype=torch.long, device=device)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [self.tokens]

    def write(
        self, tokens: torch.Tensor, positions: torch.Tensor, limit: int, lanes: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Put tokens into their places.

        Args:
            tokens, positions (`torch.LongTensor` of shape `(R, Q)`): New tokens and where they stand.
            limit (`int`): Positions in play.
            lanes (`torch.LongTensor` of shape `(R,)`, *optional*): Lanes they belong to; all by default.

        Returns:
            `torch.LongTensor` of shape `(R, limit)`: The texts so far. Behind the last token that was put into a lane
            stands whatever was there.

        Raises:
            `ValueError`: There is no room for `limit` positions.
        """
        if limit > self.max_length:
            raise InputError(f"The cache holds {self.max_length} positions, but {limit} are asked for.")
        lanes = torch.arange(len(self.tokens), device=tokens.device) if lanes is None else lanes
        self.tokens[lanes[:, None], positions] = tokens
        return self.tokens[lanes, :limit]

    def read(
        self,
        target: Any,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        limit: int,
        layer_ids: Sequence[int],
        lanes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`Target.forward_cached`] by reading the texts from their start."""
        texts = self.write(tokens, positions, limit, lanes)
        features, states = (_at(part, positions) for part in target.forward_text(texts, layer_ids))
        return features, states

    def score(self, target: Any, blocks: DraftBlocks, block: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        """States `(I, H)` after drafted token `offset + 1` of each `block`, both `(I,)`: each block's text is read."""
        states = torch.empty((len(block), target.hidden_size), dtype=target.dtype, device=block.device)
        for own in block.unique().split(BLOCKS_READ_AT_ONCE):
            texts = self.with_blocks(blocks.texts[own], blocks.anchors[own], blocks.draft_tokens[own])
            mine = torch.isin(block, own)
            row = torch.searchsorted(own, block[mine])
            states[mine] = target.forward_text(texts, ())[1][row, blocks.anchors[block[mine]] + 1 + offset[mine]]
        return states

    def with_blocks(self, texts: torch.Tensor, anchors: torch.Tensor, draft_tokens: torch.Tensor) -> torch.Tensor:
        """
        Texts with a block of proposals in place of what follows an anchor; what is held stays as it is.

        Args:
            texts, anchors (`torch.LongTensor` of shape `(N,)`): A text and an anchor for each block.
            draft_tokens (`torch.LongTensor` of shape `(N, K)`): The proposals.

        Returns:
            `torch.LongTensor` of shape `(N, furthest anchor + K + 1)`.
        """
        width = int(anchors.max()) + draft_tokens.shape[1] + 1
        rows = self.tokens[texts, :width]
        rows = torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
        places = anchors[:, None] + torch.arange(1, draft_tokens.shape[1] + 1, device=anchors.device)
        return rows.scatter(1, places, draft_tokens)


def _at(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of `(R, T, F)` values those at positions `(R, Q)`."""
    return values.gather(1, positions[..., None].expand(-1, -1, values.shape[-1]))
