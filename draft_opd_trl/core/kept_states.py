"""What stands in for the cache where tokens cannot be taken back: each lane's own, kept as it was before a block.

A state that has read a rejected token is lost (linear attention, Mamba, convolutions), and some caches have no place
for each position (latent attention, trimmed windows). So a block is read from a copy of what the model's own cache
held at its anchor. If all of it was accepted, the copy is the lane's cache from then on; if not, the accepted run is
read again from what was kept. It costs one short forward a round for each length of run among the lanes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from .rereading import TextStore


# Tensors of a cache that grow with the text, and the axis on which they do, not counting the batch's.
GROWING = {"keys": 1, "values": 1, "indexer_keys": 0}
NODES = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)


class KeptStates(TextStore):
    """
    Texts that are decoded side by side, each with its tokens and a cache of the model's own.

    Args:
        num_lanes (`int`): Texts held side by side.
        max_length (`int`): Positions a lane can hold.
        device (`torch.device`): The target's.
    """

    def __init__(self, num_lanes: int, max_length: int, device: torch.device) -> None:
        super().__init__(num_lanes, max_length, device)
        self.kept: list[Cache | None] = [None] * num_lanes
        self.lengths = [0] * num_lanes
        # What a lane's last block left behind, its row there and its length: the lane's own if all was accepted.
        self.ahead: list[tuple[Cache, int, int] | None] = [None] * num_lanes

    def tensors(self) -> list[torch.Tensor]:
        held = [self.tokens]
        for cache in (*self.kept, *(found and found[0] for found in self.ahead)):
            _map(lambda parts, _: held.append(parts[0]), [cache])
        return held

    def read(
        self,
        target: Any,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        limit: int,
        layer_ids: Sequence[int],
        lanes: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        [`Target.forward_cached`], each block from what its lane held at its start: one host sync, for where that is.

        A lane whose block starts further on than it has read gets there by the tokens last written; one whose block
        starts before that holds another text from here on, which then starts at 0.
        """
        self.write(tokens, positions, limit, lanes)
        rows = list(range(len(self.kept))) if lanes is None else lanes.tolist()
        starts = positions[:, 0].tolist()
        self._commit(target, dict(zip(rows, starts, strict=True)))
        features, states, cache = target.go_on(tokens, positions, *self._joined(rows, tokens.shape[1]), layer_ids)
        for row, (lane, start) in enumerate(zip(rows, starts, strict=True)):
            self.ahead[lane] = cache, row, start + tokens.shape[1]
        return features, states

    def _commit(self, target: Any, starts: dict[int, int]) -> None:
        """Bring lanes to where their next block begins."""
        runs: dict[tuple[int, bool], list[int]] = {}
        for lane, start in starts.items():
            ahead, self.ahead[lane] = self.ahead[lane], None
            if ahead is not None and ahead[2] == start:
                self.kept[lane], self.lengths[lane] = _row(*ahead), start
            elif start < self.lengths[lane]:  # another text
                self.kept[lane], self.lengths[lane] = None, 0
            if run := start - self.lengths[lane]:
                runs.setdefault((run, self.kept[lane] is None), []).append(lane)
        for (run, _), rows in runs.items():
            index = torch.tensor(rows, device=self.tokens.device)
            first = torch.tensor([self.lengths[lane] for lane in rows], device=index.device)
            positions = first[:, None] + torch.arange(run, device=index.device)
            tokens = self.tokens[index[:, None], positions]
            cache = target.go_on(tokens, positions, *self._joined(rows, run))[2]
            for row, lane in enumerate(rows):
                self.lengths[lane] += run
                self.kept[lane] = _row(cache, row, self.lengths[lane])

    def _joined(self, rows: list[int], width: int) -> tuple[Cache | None, torch.Tensor | None]:
        """
        Lanes side by side: one cache, texts aligned on the right, and the mask of what is text if some are shorter
        and the cache grows with them.
        """
        held = [self.kept[lane] for lane in rows]
        started = next((lane for lane in held if lane is not None), None)
        if started is None:
            return None, None
        cache = _map(_join, [_map(_nothing, [started]) if lane is None else lane for lane in held])
        lengths = torch.tensor([self.lengths[lane] for lane in rows], device=self.tokens.device)
        longest = max(self.lengths[lane] for lane in rows)
        if longest == min(self.lengths[lane] for lane in rows) or not _grows(started):
            return cache, None
        places = torch.arange(longest + width, device=lengths.device)
        return cache, (places >= longest - lengths[:, None]).long()


def _map(combine: Callable[[list[Any], str], Any], parts: list[Any], name: str = "") -> Any:
    """One tree of caches, layers, lists and dicts from several alike, by what `combine` makes of their tensors."""
    first = parts[0]
    if isinstance(first, torch.Tensor) and first.dim():
        return combine(parts, name)
    if isinstance(first, list):
        return [_map(combine, list(items), name) for items in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {key: _map(combine, [part[key] for part in parts], name) for key in first}
    if isinstance(first, NODES):
        node = copy.copy(first)
        node.__dict__ = {key: _map(combine, [vars(part)[key] for part in parts], key) for key in vars(first)}
        return node
    # The one count that layers keep of their own: how many tokens a window has seen.
    return max(parts) if name == "cumulative_length" else first


def _join(parts: list[torch.Tensor], name: str) -> torch.Tensor:
    """Rows side by side; what grows, aligned on the right."""
    if name not in GROWING:
        return torch.stack(parts)
    axis = GROWING[name]
    padded = torch.nn.utils.rnn.pad_sequence(
        [part.transpose(0, axis) for part in parts], batch_first=True, padding_side="left"
    )
    return padded.transpose(1, axis + 1)


def _row(cache: Cache, row: int, length: int) -> Cache:
    """A lane's part of a cache, without the padding before its `length` tokens."""

    def cut(parts: list[torch.Tensor], name: str) -> torch.Tensor:
        part = parts[0][row]
        if name not in GROWING:
            return part
        size = part.shape[GROWING[name]]
        return part.narrow(GROWING[name], size - min(size, length), min(size, length))

    lane = _map(cut, [cache])
    for layer in lane.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return lane


def _nothing(parts: list[torch.Tensor], name: str) -> torch.Tensor:
    """What a lane holds that has read nothing."""
    return parts[0].narrow(GROWING[name], 0, 0) if name in GROWING else torch.zeros_like(parts[0])


def _grows(cache: Cache) -> bool:
    """Whether anything in a cache has a place for each of its tokens."""
    found: list[str] = []
    _map(lambda _, name: found.append(name), [cache])
    return any(name in GROWING for name in found)
