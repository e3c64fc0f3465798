"""How causal LMs of transformers attend under the masks that are built here: without a copy of the keys a query head.

Under a mask transformers' `sdpa` repeats keys and values for the query heads that share them, in every layer of every
forward: a round of speculation would copy the whole cache. Knows no caches, and not what masks mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import attend, mask_for


NAME = "draft_opd_sdpa"
# What a layer may ask for beyond softmax attention under a mask; left to transformers.
MORE = ("softcap", "s_aux", "position_bias")


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: heads before rows, and rows before heads in what it gives."""
    heads, kv_heads = query.shape[1], key.shape[1]
    plain = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if not plain or kv_heads == heads or dropout or any(kwargs.get(name) is not None for name in MORE):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    mask = mask_for(attention_mask, query.dtype, heads, kv_heads, query.shape[-1])
    return attend(query, key, value, mask, scaling).contiguous(), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def shared_keys(decoder: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that attends by `sdpa` copies no keys for the heads that share them; others are as they were."""
    config, takes_any = decoder.config, getattr(decoder, "_supports_attention_backend", False)
    if config._attn_implementation != "sdpa" or not takes_any:
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
