"""Weights of the two streams, by hand."""

import math

import pytest
import torch

from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.training.streams import StreamSettings, dpace_weights, stream_weights


def _block(num_accepted, num_valid, num_draft_tokens=4):
    return DraftBlocks(*(torch.tensor(v) for v in ([0], [1], [[0] * num_draft_tokens], [num_accepted], [num_valid])))


def _weights(num_accepted, num_valid, on_policy=True, **streams):
    accepted, rejected = stream_weights(
        _block(num_accepted, num_valid), torch.tensor([on_policy]), StreamSettings(**streams)
    )
    return accepted[0].tolist(), rejected[0].tolist()


@pytest.mark.parametrize(
    ("num_accepted", "num_valid", "accepted", "rejected"),
    [
        # The accepted stream goes up to and including the next anchor; the rejected one starts at the first error.
        (0, 4, [1, 0, 0, 0], [2, 1, 0.5, 0.25]),
        (2, 4, [1, 1, 1, 0], [0, 0, 2, 1]),
        (3, 4, [1, 1, 1, 1], [0, 0, 0, 2]),
        (4, 4, [1, 1, 1, 1], [0, 0, 0, 0]),
        # The text ends after two slots: nothing beyond is text, and without an error nothing was rejected.
        (2, 2, [1, 1, 0, 0], [0, 0, 0, 0]),
        (1, 2, [1, 1, 0, 0], [0, 2, 1, 0.5]),
        (0, 1, [1, 0, 0, 0], [2, 1, 0.5, 0.25]),
        (0, 0, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_stream_weights_by_hand(num_accepted, num_valid, accepted, rejected):
    got = _weights(num_accepted, num_valid, rejected_weight=2.0, rejected_decay=0.5)
    assert got == (accepted, rejected)


def test_accepted_weight_and_decay():
    accepted, rejected = _weights(2, 4, accepted_weight=3.0, accepted_decay=0.5)
    assert accepted == [3, 1.5, 0.75, 0]
    assert rejected == [0, 0, 0, 0]


def test_whole_blocks_go_on_behind_the_error():
    assert _weights(1, 3, whole_blocks=True) == ([1, 1, 1, 0], [0, 0, 0, 0])


def test_without_decay_only_the_first_rejected_slot_is_left():
    assert _weights(1, 4, rejected_weight=0.5, rejected_decay=0.0)[1] == [0, 0.5, 0, 0]


def test_text_blocks_take_the_sft_decay_and_no_rejected_stream():
    accepted, rejected = _weights(
        3, 3, on_policy=False, accepted_weight=3.0, accepted_decay=0.1, sft_decay=0.5, rejected_weight=1.0
    )
    assert accepted == [1, 0.5, 0.25, 0]
    assert rejected == [0, 0, 0, 0]


def test_both_kinds_of_blocks_in_one_batch():
    both = DraftBlocks.cat([_block(4, 4), _block(1, 4)])
    accepted, rejected = stream_weights(
        both, torch.tensor([False, True]), StreamSettings(rejected_weight=1.0, rejected_decay=0.5, sft_decay=0.5)
    )
    assert accepted.tolist() == [[1, 0.5, 0.25, 0.125], [1, 1, 0, 0]]
    assert rejected.tolist() == [[0, 0, 0, 0], [0, 1, 0.5, 0.25]]


def test_the_rejected_stream_alone_is_scored():
    assert not StreamSettings().scores_rejected
    assert StreamSettings(accepted_weight=0.0, rejected_weight=0.1).scores_rejected


def slow_dpace(confidence, taught, alpha):
    """As published: a sum over slots behind, each a product over slots before."""
    weights = []
    for row, inside in zip(confidence.tolist(), taught.tolist(), strict=True):
        slots = [slot for slot in range(len(row)) if inside[slot]]
        reach = {m: math.prod((1 - alpha) * row[i] + alpha for i in slots if i <= m) for m in slots}
        weights.append([sum(reach[m] for m in slots if m >= j) if inside[j] else 0.0 for j in range(len(row))])
    return torch.tensor(weights)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_weights_equal_the_sum_of_products(alpha):
    draws = torch.Generator().manual_seed(0)
    confidence = torch.rand(5, 4, generator=draws)
    taught = torch.arange(4) < torch.tensor([4, 3, 1, 0, 4])[:, None]
    got = dpace_weights(confidence, taught, alpha)
    torch.testing.assert_close(got, slow_dpace(confidence, taught, alpha))
    if alpha == 1:
        assert got[0].tolist() == [4, 3, 2, 1] and got[1].tolist() == [3, 2, 1, 0]


def test_dpace_weights_by_hand():
    # Smoothed: 1, 0.5, 0.75, so the block is reached with 1, 0.5, 0.375.
    got = dpace_weights(torch.tensor([[1.0, 0.0, 0.5, 0.9]]), torch.tensor([[True, True, True, False]]), 0.5)
    assert got[0].tolist() == pytest.approx([1.875, 0.875, 0.375, 0])
