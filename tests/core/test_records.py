"""Records: packing, blocks, texts. Every number by hand."""

import torch

from draft_opd_trl.core.records import DraftBlocks, ReplayBatch, Rollout, num_valid_slots


def _blocks():
    return DraftBlocks(
        texts=torch.tensor([1, 0, 1]),
        anchors=torch.tensor([4, 7, 2]),
        draft_tokens=torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        num_accepted=torch.tensor([0, 3, 1]),
        num_valid=torch.tensor([3, 3, 1]),
    )


def _rollout():
    rollout = Rollout.from_ids([[1, 2], [3]], [[4, 5, 6], [7, 8]], pad_token_id=9)
    rollout.blocks = DraftBlocks(
        torch.tensor([0, 1]),
        torch.tensor([2, 1]),
        torch.tensor([[5, 6], [7, 7]]),
        torch.tensor([2, 0]),
        torch.tensor([2, 1]),
    )
    rollout.block_states = torch.arange(8.0).reshape(2, 2, 2)
    return rollout


def test_num_valid_slots_ends_with_the_text():
    # A text of 10 tokens: its last position is 9.
    valid = num_valid_slots(torch.tensor([2, 5, 6, 8]), torch.tensor([10, 10, 10, 10]), 4)
    assert valid.tolist() == [4, 4, 3, 1]


def test_error_positions():
    blocks = _blocks()
    assert blocks.has_error.tolist() == [True, False, False]
    # Anchor 4, nothing accepted: the error stood at 5.
    assert blocks.error_positions[0] == 5
    assert len(blocks) == 3 and blocks.num_draft_tokens == 3


def test_sorted_goes_by_row_then_anchor():
    blocks = _blocks().sorted()
    assert blocks.texts.tolist() == [0, 1, 1]
    assert blocks.anchors.tolist() == [7, 2, 4]
    assert blocks.draft_tokens[:, 0].tolist() == [4, 7, 1]
    assert blocks.num_accepted.tolist() == [3, 1, 0]


def test_select_by_index_and_by_mask():
    assert _blocks().select(torch.tensor([2, 0])).anchors.tolist() == [2, 4]
    assert _blocks().select(torch.tensor([False, True, False])).draft_tokens.tolist() == [[4, 5, 6]]


def test_cat_and_empty():
    empty = DraftBlocks.empty(3)
    assert len(empty) == 0 and empty.num_draft_tokens == 3 and len(empty.sorted()) == 0
    both = DraftBlocks.cat([empty, _blocks(), _blocks().select(torch.tensor([1]))])
    assert both.anchors.tolist() == [4, 7, 2, 7]
    assert both.num_valid.tolist() == [3, 3, 1, 3]


def test_from_ids_pads_on_the_right():
    rollout = _rollout()
    assert rollout.tokens.tolist() == [[1, 2, 4, 5, 6], [3, 7, 8, 9, 9]]
    assert rollout.prompt_lengths.tolist() == [2, 1]
    assert rollout.lengths.tolist() == [5, 3]
    assert rollout.completion_lengths.tolist() == [3, 2]
    assert rollout.completions() == [[4, 5, 6], [7, 8]]


def test_rows_takes_blocks_and_states_along_and_trims():
    part = _rollout().part(1, 2)
    assert part.tokens.tolist() == [[3, 7, 8]]
    assert part.blocks.texts.tolist() == [0]
    assert part.blocks.anchors.tolist() == [1]
    assert part.block_states.tolist() == [[[4.0, 5.0], [6.0, 7.0]]]


def test_rollout_cat_pads_to_the_longest():
    both = Rollout.cat([Rollout.from_ids([[1]], [[2]]), Rollout.from_ids([[3]], [[4, 5, 6]])])
    assert both.tokens.tolist() == [[1, 2, 0, 0], [3, 4, 5, 6]]
    assert both.lengths.tolist() == [2, 4]
    assert both.blocks is None


def test_to_moves_nested_blocks_and_leaves_none_alone():
    moved = _rollout().to("meta")
    assert moved.tokens.is_meta and moved.blocks.anchors.is_meta and moved.block_states.is_meta
    assert Rollout.from_ids([[1]], [[2]]).to("meta").blocks is None


def test_text_states_stand_before_their_slots_and_inside_the_text():
    index = torch.zeros(2, dtype=torch.long)
    blocks = DraftBlocks(index, torch.tensor([2, 5]), torch.zeros((2, 4), dtype=torch.long), index, index)
    weights = torch.zeros(2, 4)
    batch = ReplayBatch(
        tokens=torch.zeros((1, 8), dtype=torch.long),
        lengths=torch.tensor([8]),
        features=torch.zeros(1, 8, 1),
        blocks=blocks,
        states=torch.arange(8.0).reshape(1, 8, 1),
        draft_states=None,
        accepted_weights=weights,
        rejected_weights=weights,
        denominator=weights.sum(),
    )
    assert batch.text_states[..., 0].tolist() == [[2, 3, 4, 5], [5, 6, 7, 7]]


def test_labels_are_the_text_behind_the_anchor():
    blocks = DraftBlocks(*(torch.tensor(value) for value in ([0, 0, 1], [1, 4, 2], [[0] * 3] * 3, [0] * 3, [0] * 3)))
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 0, 0, 0]])
    batch = ReplayBatch(tokens, None, None, blocks, *[None] * 5)
    # The second text is padded from its fifth position on; what stands outside the grid repeats its last column.
    assert batch.labels.tolist() == [[3, 4, 5], [6, 7, 7], [7, 0, 0]]
