"""Weights of the two streams, by hand."""

import pytest
import torch

from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.training.streams import StreamSettings, stream_weights


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
