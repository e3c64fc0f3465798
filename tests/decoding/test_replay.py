"""
Replay equals speculation block for block (invariant 3), by hand and over families, kinds and numbers of chains.
"""

import pytest
import torch
from conftest import LAWS, ScriptedDrafter, counting_target, random_prompts, tiny_drafter
from invariants import (
    assert_replay_is_speculation,
    assert_same_blocks,
    coupling_of,
    replayed,
    replayed_law_p,
    speculated_histograms,
)

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling import draw_at
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.verification import couple_to_text
from draft_opd_trl.decoding import replay
from draft_opd_trl.decoding.replay import (
    draft_at,
    grid_of,
    read_text,
    replay_text,
    text_blocks,
)
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


CHAINS = (1, 2, 3, 8, 64)


def _text():
    return Rollout.from_ids([[1], [4, 5]], [[2, 3, 4, 5, 6, 7], [6, 7]])


def test_text_blocks_propose_the_text_and_accept_all_of_it():
    blocks = text_blocks(_text(), torch.tensor([0, 0, 1]), torch.tensor([1, 4, 2]), 3)
    assert blocks.num_valid.tolist() == [3, 2, 1]
    assert blocks.num_accepted.tolist() == [3, 2, 1]
    assert not blocks.has_error.any()
    assert blocks.draft_tokens[0].tolist() == [3, 4, 5]


def test_grid_of_by_hand():
    grid, live = grid_of(torch.tensor([1, 0, 1]), torch.tensor([5, 3, 7]), 3)
    assert grid.tolist() == [[3, 0], [5, 7], [0, 0]]
    assert live.tolist() == [[True, False], [True, True], [False, False]]


def _counting_drafter():
    """Right but for slot 2 after 2 and slot 1 after 4."""
    proposals = (torch.arange(12)[:, None] + torch.arange(1, 4)) % 12
    proposals[2, 1], proposals[4, 0] = 5, 6
    return ScriptedDrafter(proposals)


@pytest.mark.parametrize("num_chains", CHAINS)
def test_replay_by_hand(num_chains):
    rollout = Rollout.from_ids([[1], [8]], [list(range(2, 11)), [9]])
    features = torch.zeros(2, 10, 1)
    blocks = replay_text(_counting_drafter(), rollout, features, num_chains)
    # The second text is one token long: nothing to propose.
    assert blocks.texts.tolist() == [0, 0, 0, 0]
    assert blocks.anchors.tolist() == [1, 3, 4, 8]
    assert blocks.draft_tokens.tolist() == [[3, 5, 5], [6, 6, 7], [6, 7, 8], [10, 11, 0]]
    assert blocks.num_accepted.tolist() == [1, 0, 3, 1]
    assert blocks.num_valid.tolist() == [3, 3, 3, 1]


def test_replay_of_texts_without_blocks_is_empty():
    rollout = Rollout.from_ids([[1], [8, 9]], [[2], [10]])
    blocks = replay_text(_counting_drafter(), rollout, torch.zeros(2, 3, 1))
    assert len(blocks) == 0 and blocks.num_draft_tokens == 3


@pytest.mark.parametrize(("num_chains", "rounds"), [(1, 64), (4, 16), (8, 8), (64, 1)])
def test_chains_share_the_work(num_chains, rounds, monkeypatch):
    """A drafter that is always wrong visits all 64 anchors; each chain stops where the next one began."""
    drafter, calls = ScriptedDrafter([[0, 0]] * 12), []
    monkeypatch.setattr(replay, "ANCHORS_AT_ONCE", 64)
    propose = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *arguments: calls.append(1) or propose(*arguments))
    rollout = Rollout.from_ids([[1]], [[1 + at % 11 for at in range(65)]])
    blocks = replay_text(drafter, rollout, torch.zeros(1, 66, 1), num_chains)
    assert blocks.anchors.tolist() == list(range(1, 65))
    assert len(calls) == rounds


@pytest.mark.parametrize(("num_chains", "rounds"), [(1, 17), (4, 6), (16, 3)])
def test_a_drafter_that_is_mostly_right_looks_ahead(num_chains, rounds, monkeypatch):
    """Sixteen blocks of four tokens: the first round shows how right it is, the rest follow one chain."""
    proposals = (torch.arange(12)[:, None] + torch.arange(1, 4)) % 12
    drafter, calls = ScriptedDrafter(proposals), []
    propose = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *arguments: calls.append(1) or propose(*arguments))
    counting = [at % 12 for at in range(1, 65)]
    counting[34] = 0  # one surprise, which shifts every anchor behind it
    counting[35:] = [(at + 1) % 12 for at in range(29)]
    rollout = Rollout.from_ids([[0], [5]], [counting, [6]])
    blocks = replay_text(drafter, rollout, torch.zeros(2, 65, 1), num_chains)
    assert len(blocks) == 17 and blocks.has_error.sum() == 1
    assert (blocks.anchors[1:] == (blocks.anchors + blocks.num_accepted + 1)[:-1]).all()
    assert len(calls) == rounds


def test_replay_equals_scripted_speculation():
    rollout = speculate(
        counting_target(), _counting_drafter(), [[1], [3], [7, 8]], SpeculationSettings(20, [11], batch_size=2)
    )
    features = torch.zeros(*rollout.tokens.shape, 1)
    for num_chains in CHAINS:
        assert_same_blocks(replay_text(_counting_drafter(), rollout, features, num_chains), rollout.blocks)


@pytest.fixture(scope="module")
def greedy_rollout(target, drafter, prompts):
    longer = [*prompts, *random_prompts(6, seed=11)]
    stops = speculate(target, None, longer[:1], SpeculationSettings(20, [])).completions()[0][15:17]
    rollout = speculate(target, drafter, longer, SpeculationSettings(40, stops, batch_size=5))
    assert len(set(rollout.completion_lengths.tolist())) > 1
    assert len(set(rollout.blocks.num_accepted.tolist())) >= 3
    return rollout


@pytest.mark.parametrize("num_chains", CHAINS)
def test_replay_equals_speculation(target, drafter, greedy_rollout, num_chains):
    """Invariant 3."""
    assert_replay_is_speculation(target, drafter, greedy_rollout, num_chains)


@pytest.mark.parametrize("num_chains", [1, 8])
def test_replay_of_sampled_text_equals_its_speculation(target, drafter, prompts, num_chains):
    """At T > 0 with argmax proposals the verdicts can be read off the text that speculation wrote."""
    settings = SpeculationSettings(40, [5], SamplingParams(0.7, top_k=20), batch_size=3)
    rollout = speculate(target, drafter, prompts, settings, torch.Generator().manual_seed(0))
    assert (rollout.blocks.num_accepted > 0).any()
    assert_replay_is_speculation(target, drafter, rollout, num_chains)


def test_replay_reads_the_current_drafter(target, drafter, kind, greedy_rollout):
    """Given a text from another drafter, replay says what speculation with this one would have said."""
    other = tiny_drafter(kind, target, seed=9)
    prompts = [
        row[:size].tolist() for row, size in zip(greedy_rollout.tokens, greedy_rollout.prompt_lengths, strict=True)
    ]
    longest = int(greedy_rollout.completion_lengths.max())
    stops = sorted({text[-1] for text in greedy_rollout.completions() if len(text) < longest})
    expected = speculate(target, other, prompts, SpeculationSettings(longest, stops))
    assert expected.completions() == greedy_rollout.completions()
    features, _ = target.forward_text(greedy_rollout.tokens, other.target_layer_ids)
    blocks = replay_text(other, greedy_rollout, features, 4)
    assert_same_blocks(blocks, expected.blocks)
    assert len(blocks) != len(greedy_rollout.blocks)


def test_the_head_is_asked_for_no_more_than_the_verdict_takes(qwen_target, greedy_rollout, monkeypatch):
    """A block of DFlash costs at most twice the slots that decide, not all of them."""
    drafter, rows = tiny_drafter("dflash", qwen_target), []
    logits = drafter.logits

    def counting(states):
        rows.append(states.shape[:-1].numel())
        return logits(states)

    monkeypatch.setattr(drafter, "logits", counting)
    features, _ = qwen_target.forward_text(greedy_rollout.tokens, drafter.target_layer_ids)
    blocks = replay_text(drafter, greedy_rollout, features, num_chains=1, judge_only=True)
    decisive = int((blocks.num_accepted + 1).sum())
    assert sum(rows) <= 2 * decisive < len(blocks) * drafter.num_draft_tokens


def test_draft_at_equals_replay_at_its_anchors(target, drafter, greedy_rollout):
    features, _ = target.forward_text(greedy_rollout.tokens, drafter.target_layer_ids)
    state = read_text(drafter, greedy_rollout, features)
    chosen = greedy_rollout.blocks.select(torch.arange(0, len(greedy_rollout.blocks), 3))
    grid = grid_of(chosen.texts, chosen.anchors, len(greedy_rollout))
    assert_same_blocks(draft_at(drafter, state, greedy_rollout, *grid), chosen)


# -- drawn proposals: speculation's law (invariant 2) --------------------------------------------------------------


@pytest.fixture(scope="module", params=LAWS.values(), ids=LAWS)
def law_of_proposals(request, small_target, small_drafter):
    """How proposals are drawn, and the law of the blocks that speculation then exposes, with texts to replay."""
    return request.param, *speculated_histograms(small_target, small_drafter, request.param)


def test_drawn_replay_has_the_law_of_speculation(small_target, small_drafter, law_of_proposals):
    assert replayed_law_p(small_target, small_drafter, *law_of_proposals) > 1e-4


def _drawn_blind(draft_probs, target_probs, labels, uniforms):
    drafted = draw_at(draft_probs, uniforms[..., 1])
    return drafted, drafted == labels


def _always_accepted(draft_probs, target_probs, labels, uniforms):
    drafted, _ = couple_to_text(draft_probs, target_probs, labels, uniforms)
    drafted = torch.where(labels >= 0, labels, drafted)
    return drafted, labels >= 0


# Colder laws are near point masses, where drawing blind is nearly right.
@pytest.mark.parametrize("law_of_proposals", [LAWS["hot"]], ids=["hot"], indirect=True)
@pytest.mark.parametrize("wrong", [_drawn_blind, _always_accepted])
def test_a_wrong_coupling_has_another_law(small_target, small_drafter, law_of_proposals, wrong, monkeypatch):
    monkeypatch.setattr("draft_opd_trl.decoding.coupling.couple_to_text", wrong)
    assert replayed_law_p(small_target, small_drafter, *law_of_proposals) < 1e-6


def test_drawn_replay_is_the_same_for_any_chains_and_rows(target, drafter, prompts):
    """Stitched = sequential, and what is drawn for a text does not depend on its neighbours."""
    sampling = SamplingParams(1.0)
    rollout = speculate(
        target, None, prompts, SpeculationSettings(40, [5], sampling), torch.Generator().manual_seed(0)
    )
    sequential = replayed(target, drafter, rollout, sampling, num_chains=1)
    assert len(set(sequential.num_accepted.tolist())) >= 3
    for num_chains in CHAINS[1:]:
        assert_same_blocks(replayed(target, drafter, rollout, sampling, num_chains), sequential)
    features, states = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    rows = torch.tensor([4, 1])
    part = Rollout(rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows])
    coupling = coupling_of(target, states, sampling, drafter.num_draft_tokens).select(rows)
    alone = replay_text(drafter, part, features[rows], 1, coupling)
    assert_same_blocks(alone.select(alone.texts == 1), _in_row(sequential.select(sequential.texts == 1), 1))
    assert_same_blocks(alone.select(alone.texts == 0), _in_row(sequential.select(sequential.texts == 4), 0))


def _in_row(blocks, row):
    blocks.texts = torch.full_like(blocks.texts, row)
    return blocks


def test_many_anchors_are_drafted_in_parts(target, drafter, greedy_rollout, monkeypatch):
    features, _ = target.forward_text(greedy_rollout.tokens, drafter.target_layer_ids)
    whole = replay_text(drafter, greedy_rollout, features, 8)
    monkeypatch.setattr(replay, "ANCHORS_AT_ONCE", 3)
    assert_same_blocks(replay_text(drafter, greedy_rollout, features, 8), whole)
