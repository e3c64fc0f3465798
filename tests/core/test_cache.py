"""The cache with a place for each position: visibility by hand, ragged writes, scratch mode, errors."""

import gc
import weakref

import pytest
import torch
from conftest import VOCAB

from draft_opd_trl.core.cache import PositionCache, visible
from draft_opd_trl.core.records import DraftBlocks


def test_visible_is_causal_by_position():
    mask = visible(torch.tensor([[2, 0]]), torch.arange(4))
    assert mask.shape == (1, 1, 2, 4)
    assert mask[0, 0].tolist() == [[True, True, True, False], [True, False, False, False]]


def test_visible_window_counts_the_query_itself():
    mask = visible(torch.tensor([[3]]), torch.arange(5), sliding_window=2)
    assert mask[0, 0].tolist() == [[False, False, True, True, False]]


def test_visible_with_keys_of_each_row():
    mask = visible(torch.tensor([[1], [5]]), torch.tensor([[1, 2], [6, 5]]))
    assert mask[:, 0, 0].tolist() == [[True, False], [False, True]]


def _states(values):
    """Keys of one head and one channel holding `values` `(B, Q)`, in transformers' layout."""
    return torch.tensor(values, dtype=torch.float32)[:, None, :, None]


def _write(cache, values, positions, limit, **options):
    cache.place(torch.tensor(positions), limit, **options)
    keys, stored_values = cache.layers[0].update(_states(values), -_states(values))
    assert torch.equal(keys, -stored_values)
    return keys[:, 0, :, 0].tolist()


def test_rows_advance_by_different_lengths():
    cache = PositionCache(1, 2, 6)
    assert _write(cache, [[1, 2], [3, 4]], [[0, 1], [0, 1]], 2) == [[1, 2], [3, 4]]
    # Row 0 rolls back to position 1, row 1 goes on at 3: slots are positions.
    assert _write(cache, [[5], [6]], [[1], [3]], 4) == [[1, 5, 0, 0], [3, 4, 0, 6]]


def test_some_rows_alone():
    cache = PositionCache(1, 3, 4)
    _write(cache, [[1], [2], [3]], [[0], [0], [0]], 1)
    assert _write(cache, [[7]], [[1]], 2, lanes=torch.tensor([2])) == [[3, 7]]
    assert cache.layers[0].keys[:, :2, 0, 0].tolist() == [[1, 0], [2, 0], [3, 7]]


def test_scratch_mode_appends_and_leaves_the_cache_unchanged():
    cache = PositionCache(1, 1, 4)
    _write(cache, [[1, 2]], [[0, 1]], 2)
    before = cache.layers[0].keys.clone()
    assert _write(cache, [[8, 9]], [[1, 1]], 2, keep=False) == [[1, 2, 8, 9]]
    assert torch.equal(cache.layers[0].keys, before)
    assert cache.get_mask_sizes(2, 0) == (4, 0)


def test_a_branch_goes_on_alone():
    cache = PositionCache(1, 2, 6)
    _write(cache, [[1, 2, 3], [4, 5, 6]], [[0, 1, 2], [0, 1, 2]], 3)
    before = cache.layers[0].keys.clone()
    branch = cache.branch(2, room=2)
    assert _write(branch, [[7], [8]], [[2], [2]], 3) == [[1, 2, 7], [4, 5, 8]]
    assert _write(branch, [[9], [9]], [[3], [3]], 4) == [[1, 2, 7, 9], [4, 5, 8, 9]]
    assert torch.equal(cache.layers[0].keys, before) and cache.limit == 3
    with pytest.raises(ValueError, match="holds 4 positions, but 5 are asked for"):
        branch.place(torch.tensor([[4], [4]]), 5)


def test_over_capacity_is_refused():
    with pytest.raises(ValueError, match="holds 4 positions, but 5 are asked for"):
        PositionCache(1, 1, 4).place(torch.tensor([[4]]), 5)


def test_unplaced_forward_is_refused():
    cache = PositionCache(1, 1, 4)
    with pytest.raises(RuntimeError, match=r"place\(\) must say where the tokens go"):
        cache.layers[0].update(_states([[1]]), _states([[1]]))


def test_a_cache_is_freed_with_its_last_use(target):
    """By counting references alone: waiting for Python to look for cycles would hold it through a training step."""
    tokens = torch.ones((2, 10), dtype=torch.long)
    cache = target.new_cache(2, 10)
    target.forward_text(tokens, (), cache)
    gone = weakref.ref(cache.layers[0].keys)
    gc.disable()
    del cache
    freed = gone() is None
    gc.enable()
    assert freed


def test_scoring_blocks_leaves_the_targets_cache_unchanged(target):
    tokens = torch.randint(VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))
    cache = target.new_cache(2, 10)
    target.forward_text(tokens, (), cache)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    blocks = DraftBlocks(
        torch.tensor([0, 1]),
        torch.tensor([3, 5]),
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        torch.tensor([0, 1]),
        torch.tensor([3, 3]),
    )
    assert target.score_blocks(tokens, blocks, cache).abs().sum() > 0
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
