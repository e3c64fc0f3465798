"""Items of several texts, packed behind each other, and where each stands in a grid with a line for each text.

Apart from the records, as it travels with drafters.
"""

from __future__ import annotations

import torch


def pack_by_text(texts: torch.Tensor, num_texts: int) -> tuple[torch.Tensor, int]:
    """
    Columns that lay packed items out as a padded `[num_texts, width]` grid, in their order.

    Args:
        texts (`torch.LongTensor` of shape `(N,)`): Text of each item.
        num_texts (`int`): Texts of the grid.

    Returns:
        Column of each item `(N,)` and the grid's width (one host sync).
    """
    counts = torch.bincount(texts, minlength=num_texts)
    order = torch.argsort(texts, stable=True)
    starts = (counts.cumsum(0) - counts)[texts[order]]
    columns = torch.empty_like(texts)
    columns[order] = torch.arange(len(texts), device=texts.device) - starts
    return columns, int(counts.max()) if len(texts) else 0
