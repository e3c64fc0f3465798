"""What a step met, counted by hand."""

import torch

from draft_opd_trl.core.records import DraftBlocks, ReplayBatch, Rollout
from draft_opd_trl.training.replay_counts import (
    add_counts,
    count_outside,
    count_taught,
    count_texts,
    count_verification,
)


ROLLOUT = Rollout.from_ids([[1], [4, 5], [6]], [[2, 3, 4, 5, 6], [6, 7], [7]])
# Text 0 has 2 accepted and 1 more, then an error and the last token; text 1 has a block of its one open token.
BLOCKS = DraftBlocks(
    torch.tensor([0, 0, 1]),
    torch.tensor([1, 4, 2]),
    torch.zeros((3, 2), dtype=torch.long),
    torch.tensor([2, 0, 1]),
    torch.tensor([2, 1, 1]),
)


def test_texts_by_hand():
    assert count_texts(ROLLOUT, [7]) == {
        "completions/mean_length": (5 + 2 + 1, 3),
        "completions/min_length": (1, 3),
        "completions/max_length": (5, 3),
        "completions/clipped_ratio": (1, 3),
        "num_tokens": (6 + 4 + 2, None),
    }
    assert count_texts(ROLLOUT, [])["completions/clipped_ratio"] == (3, 3)


def test_verification_by_hand():
    assert count_verification(ROLLOUT, BLOCKS) == {
        "acceptance/length": (4 + 1, 3),
        "replay/error_share": (1, 3),
        "acceptance/slot_1": (2, 3),
        "acceptance/slot_2": (1, 1),
    }


def test_texts_without_blocks_count_nothing():
    nothing = count_verification(ROLLOUT, DraftBlocks.empty(1))
    assert nothing == {"acceptance/length": (0, 0), "replay/error_share": (0, 0), "acceptance/slot_1": (0, 0)}


def test_completion_tokens_outside_a_vocabulary():
    # The completions are 2 3 4 5 6, 6 7 and 7; prompts do not count.
    assert count_outside(ROLLOUT, torch.tensor([2, 3, 6])) == {"replay/outside_vocab": (4, 8)}


def test_what_is_taught():
    weights = torch.tensor([[1.0, 0.5], [0, 0], [0.1, 0]])
    batch = ReplayBatch(*[None] * 3, BLOCKS, None, None, weights, weights.flip(1), None)
    assert count_taught(batch) == {"replay/blocks": (3, None), "replay/supervised_tokens": (4, None)}


def test_counts_add_up_by_name():
    parts = [{"blocks": (2, None), "share": (1, 4)}, {"blocks": (3, None), "share": (1, 2), "other": (0, 0)}]
    assert add_counts(parts) == {"blocks": (5, None), "share": (2, 6), "other": (0, 0)}
    assert add_counts([]) == {}
