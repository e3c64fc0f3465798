"""Packed items as a grid: every column by hand."""

import torch

from draft_opd_trl.core.packing import pack_by_text


def test_items_keep_their_order_within_a_text():
    columns, width = pack_by_text(torch.tensor([2, 0, 2, 2, 0]), 4)
    assert columns.tolist() == [0, 0, 1, 2, 1]
    assert width == 3


def test_no_items_take_no_columns():
    columns, width = pack_by_text(torch.zeros(0, dtype=torch.long), 3)
    assert columns.tolist() == [] and width == 0
