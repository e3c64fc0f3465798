"""Which blocks of a text are trained on."""

import torch

from draft_opd_trl.core.records import DraftBlocks, Rollout
from draft_opd_trl.training.block_choice import choose_blocks, choose_in_each_text, random_anchors, random_places


def test_random_anchors_lie_in_the_completion_and_differ():
    for seed in range(20):
        anchors = random_anchors(12, 3, 5, torch.Generator().manual_seed(seed))
        # The completion is positions 3 … 11; the last one has nothing after it.
        assert anchors.min() >= 3 and anchors.max() <= 10
        assert len(set(anchors.tolist())) == 5 and anchors.tolist() == sorted(anchors.tolist())


def test_random_anchors_take_all_there_are_and_reach_both_ends():
    assert random_anchors(12, 3, 99, torch.Generator().manual_seed(0)).tolist() == list(range(3, 11))
    assert random_anchors(4, 3, 99, torch.Generator().manual_seed(0)).tolist() == []


def _verdicts(accepted):
    count = len(accepted)
    zeros = torch.zeros(count, dtype=torch.long)
    return DraftBlocks(
        zeros, torch.arange(count), zeros[:, None].expand(-1, 2), torch.tensor(accepted), torch.full((count,), 2)
    )


def test_choose_blocks_takes_errors_first():
    blocks = _verdicts([2, 0, 2, 1, 2, 2])
    for seed in range(10):
        chosen = choose_blocks(blocks, 3, torch.Generator().manual_seed(seed)).tolist()
        assert {1, 3} < set(chosen) and chosen == sorted(chosen)
        assert set(choose_blocks(blocks, 1, torch.Generator().manual_seed(seed)).tolist()) <= {1, 3}
    assert choose_blocks(blocks, 6, torch.Generator()).tolist() == [0, 1, 2, 3, 4, 5]


def test_choose_blocks_is_deterministic_and_varied():
    blocks = _verdicts([0] * 12)
    picks = [choose_blocks(blocks, 4, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1, 2)]
    assert picks[0] == picks[1]
    assert len({tuple(pick) for pick in picks}) == 3


def _generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_random_places_are_the_anchors_of_each_text_by_its_own_generator():
    rollout = Rollout.from_ids([[1], [2, 3], [4]], [[5] * 9, [6] * 4, [7] * 6])
    texts, anchors = random_places(rollout, [0, 2], 3, _generators(3))
    assert texts.tolist() == [0, 0, 0, 2, 2, 2]
    alone = random_anchors(7, 1, 3, torch.Generator().manual_seed(2))
    assert anchors[3:].tolist() == alone.tolist()
    assert random_places(rollout, [], 3, [])[0].tolist() == []


def test_choice_in_one_text_does_not_depend_on_the_others():
    blocks = _verdicts([0, 2, 0, 0, 2, 0, 1])
    blocks.texts = torch.tensor([0, 0, 2, 2, 2, 2, 2])
    chosen = choose_in_each_text(blocks, 2, _generators(3))
    assert chosen[:2].tolist() == [0, 1] and len(chosen) == 4
    alone = choose_blocks(blocks.select(torch.arange(2, 7)), 2, torch.Generator().manual_seed(2))
    assert chosen[2:].tolist() == (alone + 2).tolist()
