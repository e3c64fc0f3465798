"""What stands in for a target's cache where none is exact: the tokens of the texts, so that they are read anew.

Layers with a state of their own (linear attention, Mamba, convolutions), or with an attention that takes no masks,
cannot take back a token. But right padding is harmless to anything causal, so a forward over the whole text says of
every position what a cache would. It costs a text's length a round.
"""

from __future__ import annotations

import torch

from .errors import InputError


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
