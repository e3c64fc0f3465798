"""Attention under a mask, laid out so that a fused kernel takes it on every device.

Under a mask PyTorch's fused CUDA kernels want as many heads of keys as of queries (`enable_gqa` is math there unless
cuDNN takes it) and a mask of numbers whose rows are aligned; otherwise scores are held whole. So query heads that
share keys become rows of one longer query, which copies no keys. Knows no models.
Source: `can_use_mem_efficient_attention` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and `preprocess_mask`
in ../attention.cpp (PyTorch 2.13).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


# The stride of a mask's rows that the memory-efficient kernel reads; others are copied by each call.
ROW_ALIGNMENT = 8


def mask_for(sees: torch.Tensor, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """
    What is added to scores, for [`attend`]; made once for all layers that see the same.

    Args:
        sees (`torch.BoolTensor` of shape `(B, 1, Q, S)`): Keys that take part; at least one for each query.
        dtype (`torch.dtype`): Of the queries, keys and values.
        heads, kv_heads, head_dim (`int`): Of the layers.

    Returns:
        `torch.Tensor` of shape `(B, 1, Q, S)`, or `(B, 1, G · Q, S)` where G query heads share keys and so many rows
        are less to hold than the keys and values of each.
    """
    (batch, _, rows, size), groups = sees.shape, heads // kv_heads
    # More rows, `groups * rows` each key, against keys and values of all heads, `2 * heads * head_dim`.
    repeats = groups if rows <= 2 * kv_heads * head_dim else 1
    width = -(-size // ROW_ALIGNMENT) * ROW_ALIGNMENT
    mask = torch.zeros((batch, repeats, rows, width), dtype=dtype, device=sees.device)[..., :size]
    return mask.masked_fill_(~sees, float("-inf")).flatten(1, 2)[:, None]


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None = None,
) -> torch.Tensor:
    """
    Softmax attention, by a fused kernel: no scores are held.

    Args:
        queries (`torch.Tensor` of shape `(B, heads, Q, head_dim)`): Consecutive heads share keys.
        keys, values (`torch.Tensor` of shape `(B, kv_heads, S, head_dim)`): Of the same dtype.
        mask (`torch.Tensor`, *optional*): From [`mask_for`]; all keys take part by default.
        scale (`float`, *optional*): Of the scores; `head_dim ** -0.5` by default.

    Returns:
        `torch.Tensor` of shape `(B, Q, heads, head_dim)`.
    """
    (heads, rows), kv_heads = queries.shape[1:3], keys.shape[1]
    groups = heads // kv_heads
    # Without a mask every row sees the same, so rows of several heads can stand behind each other.
    grouped = mask is None or mask.shape[2] == groups * rows
    if grouped:
        queries = queries.unflatten(1, (kv_heads, groups)).flatten(2, 3)
    else:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    if grouped:
        attended = attended.unflatten(2, (groups, rows)).flatten(1, 2)
    return attended.transpose(1, 2)


def attend_densely(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """[`attend`] as it reads, with all scores held in float32: the reference."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    scores = queries.float() @ keys.float().transpose(-1, -2) * (queries.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~sees, float("-inf")).softmax(-1)
    return (weights @ values.float()).to(values.dtype).transpose(1, 2)
