"""A KV cache with a place for each position.

Texts of a batch advance by different lengths in speculation. With a place for each position, every lane is
right-padded, rolling back is overwriting, and sliding windows stay exact (a left-padded cache with holes is wrong on
them). Holds keys, values and visibility. It does not know what the tokens mean.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import InputError


def cache_argument(forward: Callable) -> str:
    """What a model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def visible(
    query_positions: torch.Tensor, key_positions: torch.Tensor, sliding_window: int | None = None
) -> torch.Tensor:
    """
    Causal visibility by position.

    Args:
        query_positions (`torch.LongTensor` of shape `(B, Q)`): Positions that look.
        key_positions (`torch.LongTensor` of shape `(S,)` or `(B, S)`): Positions that are looked at.
        sliding_window (`int`, *optional*): Positions a query sees, its own included.

    Returns:
        `torch.BoolTensor` of shape `(B, 1, Q, S)`: `True` where the key takes part.
    """
    keys = key_positions.reshape(-1, 1, 1, key_positions.shape[-1])
    queries = query_positions[:, None, :, None]
    mask = keys <= queries
    if sliding_window is not None:
        mask = mask & (keys > queries - sliding_window)
    return mask


class _PositionLayer(CacheLayerMixin):
    """Keys and values `[B, S, heads, head_dim]` of one layer; the parent says where the next ones go."""

    is_sliding = False

    def __init__(self, parent: PositionCache) -> None:
        super().__init__()
        # Weak: in a cycle, gigabytes of keys would live on after the last use, until Python looks for cycles.
        self.parent = weakref.proxy(parent)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        shape = (self.parent.num_lanes, self.parent.max_length, key_states.shape[1])
        # Zeros, not empty: positions never written are masked, but a NaN there would survive the mask.
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]))
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.parent
        if place.positions is None:
            raise RuntimeError("PositionCache.place() must say where the tokens go before each forward.")
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if place.keep:
            lanes = place.lane_index[:, None]
            self.keys[lanes, place.positions] = keys
            self.values[lanes, place.positions] = values
        stored_keys, stored_values = self.keys[:, : place.limit], self.values[:, : place.limit]
        if place.partial:
            stored_keys, stored_values = stored_keys[place.lane_index], stored_values[place.lane_index]
        if not place.keep:
            stored_keys = torch.cat([stored_keys, keys], dim=1)
            stored_values = torch.cat([stored_values, values], dim=1)
        return stored_keys.transpose(1, 2), stored_values.transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.parent.limit + (0 if self.parent.keep else query_length), 0

    def get_seq_length(self) -> int:
        return self.parent.limit

    def get_max_length(self) -> int:
        return self.parent.max_length


class PositionCache(Cache):
    """
    Cache for a transformers model that holds each token at its position.

    Args:
        num_layers (`int`): Attention layers of the model.
        num_lanes (`int`): Texts held side by side.
        max_length (`int`): Positions a lane can hold.
    """

    def __init__(self, num_layers: int, num_lanes: int, max_length: int) -> None:
        self.num_lanes, self.max_length = num_lanes, max_length
        self.limit = 0
        self.positions: torch.Tensor | None = None
        super().__init__(layers=[_PositionLayer(self) for _ in range(num_layers)])

    def tensors(self) -> list[torch.Tensor]:
        """All that is held."""
        return [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]

    def place(self, positions: torch.Tensor, limit: int, lanes: torch.Tensor | None = None, keep: bool = True) -> None:
        """
        Say where the tokens of the next forward go.

        Args:
            positions (`torch.LongTensor` of shape `(R, Q)`): Positions of the tokens.
            limit (`int`): Positions to attend to; above every position in play (known on the host, so no sync).
            lanes (`torch.LongTensor` of shape `(R,)`, *optional*): Cache lanes they belong to; all lanes by default.
            keep (`bool`, *optional*, defaults to `True`): `False` appends their keys for this forward only.
        """
        if limit > self.max_length:
            raise InputError(f"The cache holds {self.max_length} positions, but {limit} are asked for.")
        self.positions, self.limit, self.keep = positions, limit, keep
        self.partial = lanes is not None
        self.lane_index = torch.arange(self.num_lanes, device=positions.device) if lanes is None else lanes

    def branch(self, limit: int, room: int) -> PositionCache:
        """
        A copy to go on from, which leaves this one as it is.

        Args:
            limit (`int`): Positions to copy.
            room (`int`): Places behind them, for whatever comes next.
        """
        copy = PositionCache(len(self.layers), self.num_lanes, limit + room)
        for mine, theirs in zip(self.layers, copy.layers, strict=True):
            if mine.is_initialized:
                theirs.lazy_initialization(mine.keys.transpose(1, 2), mine.values.transpose(1, 2))
                theirs.keys[:, :limit], theirs.values[:, :limit] = mine.keys[:, :limit], mine.values[:, :limit]
        return copy
