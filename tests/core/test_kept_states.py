"""Targets whose own cache is kept as it was before each block: the same texts as by reading everything anew."""

import pytest
import torch
from conftest import ANY_KIND, RECURRENT, random_prompts, tiny_drafter, tiny_model
from invariants import assert_lossless, assert_replay_is_speculation

from draft_opd_trl.core.kept_states import KeptStates
from draft_opd_trl.core.rereading import TextStore
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


# Beside recurrent layers, what only trims its keys: a window is not exact in a cache of positions told to do without.
KEPT = [*RECURRENT, "gemma3"]


@pytest.fixture(scope="module", params=KEPT)
def kept(request):
    target = Target(tiny_model(request.param))
    target.no_places = target.no_places or "a test says so"
    return target


def _anew(target):
    """The reference: the same model, each text read from its start."""
    other = Target(target.model)
    other.no_places = other.reads_anew = "a test says so"
    return other


def test_states_are_kept_where_the_models_own_cache_is_exact(kept):
    assert kept.reads_anew is None and type(kept.new_cache(1, 4)) is KeptStates
    assert type(_anew(kept).new_cache(1, 4)) is TextStore


def test_texts_advance_by_different_lengths_and_lanes_are_taken_anew(kept):
    """Blocks of any length behind runs of any length, a rejected tail, another text in a lane: as the text itself."""
    texts = torch.arange(48).view(2, 24) % kept.vocab_size
    other = texts.flip(0, 1)
    expected, of_other = (kept.forward_text(values, (0, 2)) for values in (texts, other))
    stores = kept.new_cache(2, 24), _anew(kept).new_cache(2, 24)
    rounds = [([0, 0], 9), ([3, 9], 4), ([5, 13], 4), ([9, 14], 1), ([10, 15], 7), ([16, 16], 1)]
    for (starts, width), (next_starts, _) in zip(rounds, rounds[1:], strict=False):
        places = torch.tensor(starts)[:, None] + torch.arange(width)
        # What stands behind the accepted run is nothing that a later block may see.
        accepted = places < torch.tensor(next_starts)[:, None]
        block = texts.gather(1, places)
        block = torch.where(accepted, block, (block + 1) % kept.vocab_size)
        for store in stores:
            for got, right in zip(kept.forward_cached(block, places, store, 24, (0, 2)), expected, strict=True):
                rows = right.gather(1, places[..., None].expand(-1, -1, right.shape[-1]))
                torch.testing.assert_close(got[accepted], rows[accepted], rtol=1e-3, atol=1e-3)
    lane, places = torch.tensor([1]), torch.arange(6)[None]
    got = kept.forward_cached(other[1:, :6], places, stores[0], 24, (0, 2), lane)
    for mine, right in zip(got, of_other, strict=True):
        torch.testing.assert_close(mine, right[1:, :6], rtol=1e-3, atol=1e-3)


def test_what_is_kept_is_counted_and_bounded(kept):
    store = kept.new_cache(2, 8)
    before = len(store.tensors())
    kept.forward_cached(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 1], [0, 1]]), store, 2)
    assert len(store.tensors()) > before
    with pytest.raises(ValueError, match="holds 8 positions, but 9 are asked for"):
        kept.forward_cached(torch.tensor([[1], [1]]), torch.tensor([[8], [8]]), store, 9)


def test_speculation_writes_the_targets_text(kept, kind):
    settings = SpeculationSettings(20, [3, 9], batch_size=3)
    assert_lossless(kept, tiny_drafter(kind, kept), random_prompts(5, seed=3), settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_blocks_are_those_of_reading_anew(kept, temperature):
    anew, drafter = _anew(kept), tiny_drafter(ANY_KIND, kept)
    sampling = SamplingParams(temperature)
    settings = SpeculationSettings(20, [3], sampling, batch_size=2, sample_proposals=temperature > 0)
    prompts = random_prompts(5, seed=3)
    expected, got = (speculate(target, drafter, prompts, settings, seeds=range(5)) for target in (anew, kept))
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.blocks.draft_tokens, expected.blocks.draft_tokens)
    assert torch.equal(got.blocks.num_accepted, expected.blocks.num_accepted)


def test_replay_is_speculation(kept):
    drafter = tiny_drafter(ANY_KIND, kept)
    rollout = speculate(kept, drafter, random_prompts(4, seed=5), SpeculationSettings(24, [3], batch_size=3))
    assert_replay_is_speculation(kept, drafter, rollout)


def test_a_round_reads_the_accepted_run_and_the_block(monkeypatch):
    """Not the text: what is read in a round does not grow with it."""
    target = Target(tiny_model("qwen3_5_text"))
    drafter, read = tiny_drafter(ANY_KIND, target), []
    go_on = target.go_on
    monkeypatch.setattr(target, "go_on", lambda tokens, *rest: read.append(tokens.shape[1]) or go_on(tokens, *rest))
    rollout = speculate(target, drafter, [[5, 6, 7]], SpeculationSettings(60, [], batch_size=1))
    block = drafter.num_draft_tokens + 1
    assert max(read) == block and sum(read) <= 3 + len(rollout.blocks) * (2 * block - 1)


def test_a_cache_that_is_not_exact_in_parts_is_noticed(monkeypatch):
    """Told by name, with the reason why no cache of positions is exact."""
    target = Target(tiny_model("lfm2"))
    go_on = target.go_on
    monkeypatch.setattr(Target, "go_on", lambda _, tokens, places, *past: go_on(tokens, places, None))
    assert "conv" in Target(target.model).reads_anew
    assert "read in parts by its own cache is not that text" in Target(target.model).reads_anew
    monkeypatch.setattr(Target, "go_on", None)
    assert "cannot be gone on from (TypeError)" in Target(target.model).reads_anew
