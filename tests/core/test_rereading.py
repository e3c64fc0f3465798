"""Targets over which no cache of positions is exact: texts are read anew, and everything else is as it was."""

import pytest
import torch
from conftest import ANY_KIND, RECURRENT, random_prompts, tiny_drafter, tiny_model
from invariants import (
    assert_kept_states_are_those_of_packed_scoring,
    assert_lossless,
    assert_replay_is_speculation,
)

from draft_opd_trl.core.cache import PositionCache
from draft_opd_trl.core.rereading import TextStore
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent(request):
    return _read_anew(request.param)


def _read_anew(family):
    """A target over which a cache is exact, told to do without."""
    target = Target(tiny_model(family))
    target.no_places = target.reads_anew = "a test says so"
    return target


def test_a_store_holds_tokens_at_their_positions():
    store = TextStore(2, 6, "cpu")
    store.write(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]), 3, torch.tensor([1]))
    texts = store.write(torch.tensor([[7, 8]]), torch.tensor([[2, 3]]), 4, torch.tensor([1]))
    assert texts.tolist() == [[1, 2, 7, 8]]
    blocks = store.with_blocks(torch.tensor([1, 1]), torch.tensor([0, 3]), torch.tensor([[4, 5, 6], [4, 5, 6]]))
    assert blocks.tolist() == [[1, 4, 5, 6, 0, 0, 0], [1, 2, 7, 8, 4, 5, 6]]
    assert store.tokens[1].tolist() == [1, 2, 7, 8, 0, 0]
    with pytest.raises(ValueError, match="holds 6 positions, but 7 are asked for"):
        store.write(torch.tensor([[1]]), torch.tensor([[6]]), 7)


def test_which_targets_read_anew(recurrent):
    assert type(recurrent.new_cache(1, 4)) is TextStore
    assert isinstance(Target(tiny_model("gemma3")).new_cache(1, 4), PositionCache)


def test_speculation_writes_the_targets_text(recurrent, kind):
    settings = SpeculationSettings(20, [3, 9], batch_size=2)
    assert_lossless(recurrent, tiny_drafter(kind, recurrent), random_prompts(4, seed=3), settings)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_blocks_are_those_that_a_cache_gives(family):
    cached, anew = Target(tiny_model(family)), _read_anew(family)
    drafter = tiny_drafter(ANY_KIND, cached)
    settings = SpeculationSettings(20, [3], SamplingParams(1.0), batch_size=2, sample_proposals=True)
    prompts = random_prompts(5, seed=3)
    expected, got = (speculate(t, drafter, prompts, settings, seeds=range(5)) for t in (cached, anew))
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.blocks.num_accepted, expected.blocks.num_accepted)


def test_replay_is_speculation(recurrent, kind):
    drafter = tiny_drafter(kind, recurrent)
    rollout = speculate(recurrent, drafter, random_prompts(4, seed=5), SpeculationSettings(24, [3], batch_size=3))
    assert_replay_is_speculation(recurrent, drafter, rollout)


def test_scored_blocks_are_those_that_verification_read(recurrent):
    drafter = tiny_drafter(ANY_KIND, recurrent)
    assert_kept_states_are_those_of_packed_scoring(recurrent, drafter, SamplingParams(0.0))
