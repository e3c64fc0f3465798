"""DFlash: a block-parallel drafter that reads tapped target states as context keys and values.

The model, in the flat layout that z-lab publishes and SGLang and vLLM load; its config stands in `dflash_config.py`.
Knows nothing of rollouts, losses or where anchors come from.
Source: z-lab DFlash checkpoints and modelling file (layout, layer ids, mask token); attention follows Qwen3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from .errors import InputError
from .records import DraftBlocks, pack_by_text
from .sampling import Chooser
from .target import Target, TargetShape
from .base import Drafter, Proposal
from .dflash_config import DFlashConfig
from .parts import copy_norm, draft_in_parts, init_layer, rotate


class DFlashAttention(nn.Module):
    """Queries from the block alone; keys and values from context and block through the same projections."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_values(
        self, states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed, rotated keys and values `(B, Q, kv_heads, head_dim)` of states `(B, Q, H)`."""
        keys = self.k_norm(self._split(self.k_proj(states)))
        return rotate(keys, *rotary), self._split(self.v_proj(states))

    def forward(
        self,
        noise: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        queries = rotate(self.q_norm(self._split(self.q_proj(noise))), *rotary)
        attended = nn.functional.scaled_dot_product_attention(
            queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class DFlashLayer(nn.Module):
    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden, rotary, attend) -> torch.Tensor:
        """`attend(normed block states) -> (keys, values, mask)` decides what the block sees."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotary, *attend(normed))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass
class DFlashState:
    """Context keys and values by position, one pair `(B, S, kv_heads, head_dim)` a draft layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]


class DFlashDraftModel(Drafter):
    """
    The DFlash draft model. It has no embedding and no head: both are the target's (see [`Drafter.bind`]).

    Args:
        config ([`DFlashConfig`]): Shape, taps, block size and mask token.
    """

    kind = "dflash"
    config_class = DFlashConfig
    base_model_prefix = ""
    _supports_sdpa = True
    # Blocks of a text attend to themselves and the context; packing more of them in one call wastes attention
    # quadratically, fewer waste launches. With gradient checkpointing one such chunk is recomputed at a time.
    blocks_per_chunk = 32

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__(config)
        taps = len(config.target_layer_ids)
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(DFlashLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.post_init()

    @property
    def target_layer_ids(self) -> list[int]:
        return self.config.target_layer_ids

    @property
    def num_draft_tokens(self) -> int:
        return self.config.block_size - 1

    @property
    def sft_decay(self) -> float:
        return math.exp(-1 / (4 if self.config.block_size <= 8 else 7))

    def check_target(self, target: Target | TargetShape) -> None:
        config, faults = self.config, []
        if config.hidden_size != target.hidden_size:
            faults.append(f"drafter hidden_size {config.hidden_size} is not the target's {target.hidden_size}")
        if config.vocab_size != target.vocab_size:
            faults.append(f"drafter vocab_size {config.vocab_size} is not the target's {target.vocab_size}")
        if config.num_target_layers not in (None, target.num_layers):
            faults.append(
                f"drafter was made for {config.num_target_layers} target layers, this one has {target.num_layers}"
            )
        ids = config.target_layer_ids
        outside = [index for index in ids if not 0 <= index < target.num_layers - 1]
        if outside or not ids:
            faults.append(
                f"target_layer_ids {ids} must name layers 0 … {target.num_layers - 2} (the last layer's output is "
                "normed in some engines and not in others)"
            )
        mask = config.mask_token_id
        if mask is None or not 0 <= mask < target.vocab_size:
            faults.append(f"mask_token_id {mask} is not a token of the target's vocabulary of {target.vocab_size}")
        if config.block_size < 2:
            faults.append(f"block_size {config.block_size} leaves no slot to propose; it must be at least 2")
        if faults:
            raise InputError(
                f"This DFlash drafter does not fit the target {target.name}: "
                + "; ".join(faults)
                + ". Take the drafter made for this target, or make one with `create_drafter`."
            )

    @property
    def linear_head(self) -> torch.Tensor:
        return self.target.head.weight

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        weight = self.linear_head
        return nn.functional.linear(states.to(weight.dtype), weight)

    # -- context ------------------------------------------------------------------------------------------------

    def _context(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        context = self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))
        rotary = self.rotary_emb(context, positions)
        return [layer.self_attn.keys_values(context, rotary) for layer in self.layers]

    def start(self, batch_size: int, max_length: int) -> DFlashState:
        attention = self.layers[0].self_attn
        shape = (batch_size, max_length, self.config.num_key_value_heads, attention.head_dim)
        weight = attention.k_proj.weight
        return DFlashState([(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers])

    def extend(self, state, features, positions, tokens, lanes=None) -> None:
        if lanes is None:
            lanes = torch.arange(positions.shape[0], device=positions.device)
        for (keys, values), (new_keys, new_values) in zip(
            state.layers, self._context(features, positions), strict=True
        ):
            keys[lanes[:, None], positions] = new_keys.to(keys.dtype)
            values[lanes[:, None], positions] = new_values.to(values.dtype)

    # -- drafting -----------------------------------------------------------------------------------------------

    def _draft(
        self, context: list[tuple[torch.Tensor, torch.Tensor]], tokens: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """States `(B, M, K, H)` of blocks at `anchors` `(B, M)` whose anchor tokens are `tokens` `(B, M)`."""
        batch, num_blocks = anchors.shape
        size = self.config.block_size
        ids = tokens.new_full((batch, num_blocks, size), self.config.mask_token_id)
        ids[..., 0] = tokens
        slots = torch.arange(size, device=anchors.device)
        positions = (anchors[..., None] + slots).flatten(1)
        hidden = self.target.embed(ids.flatten(1)).to(context[0][0].dtype)
        rotary = self.rotary_emb(hidden, positions)

        key_positions = torch.arange(context[0][0].shape[1], device=anchors.device)
        sees_context = key_positions < anchors.repeat_interleave(size, dim=1)[..., None]
        block_ids = torch.arange(num_blocks, device=anchors.device).repeat_interleave(size)
        sees_block = (block_ids[:, None] == block_ids).expand(batch, -1, -1)
        mask = torch.cat([sees_context, sees_block], dim=-1)[:, None]

        for layer, (keys, values) in zip(self.layers, context, strict=True):

            def attend(normed, layer=layer, keys=keys, values=values):
                own_keys, own_values = layer.self_attn.keys_values(normed, rotary)
                return torch.cat([keys, own_keys], dim=1), torch.cat([values, own_values], dim=1), mask

            hidden = layer(hidden, rotary, attend)
        return self.norm(hidden).unflatten(1, (num_blocks, size))[:, :, 1:]

    def propose(self, state, tokens, anchors, limit, choose: Chooser) -> Proposal:
        context = [(keys[:, :limit], values[:, :limit]) for keys, values in state.layers]
        return Proposal(*choose(self.logits(self._draft(context, tokens, anchors))))

    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, -1)
        context = self._context(features, positions)
        columns, width = pack_by_text(blocks.texts, batch)
        # Grid cells without a block draft at position 1 and are dropped.
        anchors = torch.ones((batch, max(width, 1)), dtype=torch.long, device=tokens.device)
        anchors[blocks.texts, columns] = blocks.anchors
        anchor_tokens = tokens.gather(1, anchors.clamp(max=length - 1))

        def draft(part: slice) -> torch.Tensor:
            return self._draft(context, anchor_tokens[:, part], anchors[:, part])

        states = draft_in_parts(draft, anchors.shape[1], self.blocks_per_chunk, self.gradient_checkpointing)
        return states[blocks.texts, columns]

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

    @torch.no_grad()
    def init_from_target(self, target: Target) -> DFlashDraftModel:
        """
        Start from the target's last layers where shapes fit, with `fc` the mean of the taps.
        """
        last = target.decoder.layers[-len(self.layers) :]
        for layer, source in zip(self.layers, last, strict=False):
            init_layer(layer, source)
        taps = len(self.target_layer_ids)
        eye = torch.eye(self.config.hidden_size, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        self.fc.weight.copy_(eye.repeat(1, taps) / taps)
        copy_norm(self.norm, target.decoder.norm)
        return self
