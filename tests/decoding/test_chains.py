"""The search for a text's blocks, with outcomes written by hand: no model is asked."""

import pytest
import torch

from draft_opd_trl.core.records import DraftBlocks, Rollout, num_valid_slots
from draft_opd_trl.decoding.chains import Chains


K = 2


def search(accepted, num_chains, prompt_length=1):
    """A text whose block at anchor a has `accepted[a]` accepted; returns its blocks and the anchors of each round."""
    length = len(accepted) + 1
    rollout = Rollout.from_ids([[0] * prompt_length], [[0] * (length - prompt_length)])
    chains, rounds = Chains(rollout, K, num_chains), []
    while chains.running:
        grid, live = chains.next_anchors()
        anchors = grid[live]
        rounds.append(sorted(anchors.tolist()))
        texts = torch.zeros_like(anchors)
        num_valid = num_valid_slots(anchors, rollout.lengths[texts], K)
        outcome = torch.minimum(torch.tensor(accepted)[anchors], num_valid)
        chains.note(DraftBlocks(texts, anchors, anchors[:, None] + torch.arange(1, K + 1), outcome, num_valid))
    return chains.blocks(), rounds


def test_one_chain_goes_from_block_to_block():
    blocks, rounds = search([0, 1, 2, 0, 2, 0, 0, 0], 1)
    # From 1 one token was accepted, so the next anchor is 3, then 4, then 7, whose one slot is wrong.
    assert blocks.anchors.tolist() == [1, 3, 4, 7]
    assert blocks.num_accepted.tolist() == [1, 0, 2, 0]
    assert blocks.num_valid.tolist() == [2, 2, 2, 1]
    assert blocks.draft_tokens.tolist() == [[2, 3], [4, 5], [5, 6], [8, 9]]
    assert rounds == [[1], [3], [4], [7]]


def test_chains_stop_where_another_has_been():
    blocks, rounds = search([0] * 9, 2)
    assert blocks.anchors.tolist() == list(range(1, 9))
    # The first chain ends at 5, where the second began: four rounds in place of eight, and no anchor twice.
    assert rounds == [[1, 5], [2, 6], [3, 7], [4, 8]]


def test_whole_blocks_are_followed_ahead():
    blocks, rounds = search([2] * 30, 4)
    assert blocks.anchors.tolist() == list(range(1, 30, 3))
    assert len(rounds) < 10 / 2


@pytest.mark.parametrize("num_chains", [2, 3, 8, 64])
def test_any_number_of_chains_finds_the_same_blocks(num_chains):
    draws = torch.Generator().manual_seed(num_chains)
    for _ in range(20):
        accepted = torch.randint(0, K + 1, (40,), generator=draws).tolist()
        one, many = search(accepted, 1, prompt_length=3)[0], search(accepted, num_chains, prompt_length=3)[0]
        for name in vars(one):
            assert torch.equal(getattr(one, name), getattr(many, name)), name


def test_a_text_of_one_token_has_no_blocks():
    blocks, rounds = search([0], 4, prompt_length=1)
    assert len(blocks) == 0 and rounds == []
