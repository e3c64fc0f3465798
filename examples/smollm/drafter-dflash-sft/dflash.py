"""DFlash: the block backbone with the target's own head.

In the flat layout that z-lab publishes and SGLang and vLLM load; its config stands in `dflash_config.py`.
Knows nothing of rollouts, losses or where anchors come from.
Source: z-lab DFlash checkpoints and modelling file (layout, layer ids, mask token).
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .block_backbone import BlockDrafter
from .dflash_config import DFlashConfig


class DFlashDraftModel(BlockDrafter):
    """
    The DFlash draft model. It has no embedding and no head: both are the target's (see [`Drafter.bind`]).

    Args:
        config ([`DFlashConfig`]): Shape, taps, block size and mask token.
    """

    kind = "dflash"
    config_class = DFlashConfig

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def sft_decay(self) -> float:
        return math.exp(-1 / (4 if self.config.block_size <= 8 else 7))

    @property
    def linear_head(self) -> torch.Tensor:
        return self.target.head.weight

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.linear_head
        return nn.functional.linear(states.to(weight.dtype), weight)

    def forward(
        self,
        noise_embeds: torch.Tensor,
        context_hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> SimpleNamespace:
        """
        The entry that transformers' own `generate(speculation_type="dflash")` calls; batch 1, no padding.

        Args:
            noise_embeds (`torch.Tensor` of shape `(1, block_size, H)`): Embedded anchor and mask tokens.
            context_hidden_states (`torch.Tensor` of shape `(1, C, F)`): Features of newly committed positions.
            position_ids (`torch.LongTensor` of shape `(1, C + block_size)`): Positions of both.
            cache ([`~transformers.Cache`]): Holds context and block of earlier calls, cropped by the caller;
                `past_key_values` before transformers 5.24.

        Returns:
            An object with `last_hidden_state` of shape `(1, block_size, H)`.
        """
        cache = past_key_values if cache is None else cache
        context = self.hidden_norm(self.fc(context_hidden_states.to(self.fc.weight.dtype)))
        hidden = noise_embeds.to(context.dtype)
        cos, sin = self.rotary_emb(hidden, position_ids)
        split = context.shape[1]
        rotary = (cos[:, split:], sin[:, split:])
        for index, layer in enumerate(self.layers):

            def attend(normed, index=index, layer=layer):
                keys, values = layer.self_attn.keys_values(torch.cat([context, normed], dim=1), (cos, sin))
                keys, values = cache.update(keys.transpose(1, 2), values.transpose(1, 2), index)
                return keys.transpose(1, 2), values.transpose(1, 2), None

            hidden = layer(hidden, rotary, attend)
        return SimpleNamespace(last_hidden_state=self.norm(hidden))
