"""The backbone of drafters that fill a whole block in one pass, reading tapped target states as context.

What they share: attention, layers, the context's keys and values by position, the pass over packed blocks. What a kind
adds: its config, which slots propose, and the head. Knows no drafter kinds.
Source: z-lab's DFlash modelling file; attention follows Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding

from .attention import attend, mask_for
from .base import Drafter, Proposal
from .parts import copy_norm, draft_in_parts, in_dtype_of, init_layer, lay_out, layers_to_start_from, rotate




class BlockAttention(nn.Module):
    """Queries from the block alone; keys and values from context and block through the same projections."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_sizes = heads, kv_heads, self.head_dim
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
        values = self._split(self.v_proj(states))
        # Norms and rotation are float32 under autocast, and attention is not.
        return rotate(self.k_norm(self._split(self.k_proj(states))), *rotary).to(values.dtype), values

    def forward(
        self,
        noise: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        queries = rotate(self.q_norm(self._split(self.q_proj(noise))), *rotary).to(values.dtype)
        attended = attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask)
        return self.o_proj(attended.flatten(2))


class BlockLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden, rotary, attend) -> torch.Tensor:
        """`attend(normed block states) -> (keys, values, mask)` decides what the block sees."""
        normed = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(normed, rotary, *attend(normed))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass
class BlockState:
    """Context keys and values by position, one pair `(B, S, kv_heads, head_dim)` a draft layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]

    def up_to(self, limit: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Those of the first `limit` positions."""
        return [(keys[:, :limit], values[:, :limit]) for keys, values in self.layers]


class BlockDrafter(Drafter):
    """
    A drafter on this backbone. It has no embedding: it borrows the target's (see [`Drafter.bind`]).

    Args:
        config ([`DrafterConfig`]): Over a [`~transformers.Qwen3Config`], with `block_size`, `mask_token_id`,
            `target_layer_ids` and, where it is known, `num_target_layers`.
    """

    _supports_sdpa = True
    # Slot 0 is the anchor. Those from here on propose: slot k the token at its own position, or, where the anchor's
    # proposes too, the one after.
    first_slot = 1
    # Blocks of a text attend to themselves and the context; packing more of them in one call wastes attention
    # quadratically, fewer waste launches. With gradient checkpointing one such chunk is recomputed at a time.
    blocks_per_chunk = 32

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mask_token_id = config.mask_token_id
        taps = len(config.target_layer_ids)
        self.fc = nn.Linear(taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)

    @property
    def target_layer_ids(self) -> list[int]:
        return self.config.target_layer_ids

    @property
    def num_draft_tokens(self) -> int:
        return self.config.block_size - self.first_slot

    def check_target(self, target: TargetShape) -> None:
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
        if self.num_draft_tokens < 1:
            least = f"it must be at least {self.first_slot + 1}"
            faults.append(f"block_size {config.block_size} leaves no slot to propose; {least}")
        self.refuse_misfit(faults, target)

    # -- context ------------------------------------------------------------------------------------------------

    def _context(self, features: torch.Tensor, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        context = self.hidden_norm(self.fc(in_dtype_of(self.fc.weight, features)))
        rotary = self.rotary_emb(context, positions)
        return [layer.self_attn.keys_values(context, rotary) for layer in self.layers]

    def start(self, batch_size: int, max_length: int) -> BlockState:
        attention = self.layers[0].self_attn
        shape = (batch_size, max_length, self.config.num_key_value_heads, attention.head_dim)
        weight = attention.k_proj.weight
        return BlockState([(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers])

    def extend(self, state, features, positions, tokens, lanes=None) -> None:
        if lanes is None:
            lanes = torch.arange(positions.shape[0], device=positions.device)
        for (keys, values), (new_keys, new_values) in zip(
            state.layers, self._context(features, positions), strict=True
        ):
            keys[lanes[:, None], positions] = new_keys.to(keys.dtype)
            values[lanes[:, None], positions] = new_values.to(values.dtype)

    # -- drafting -----------------------------------------------------------------------------------------------

    def block_states(
        self, context: list[tuple[torch.Tensor, torch.Tensor]], tokens: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """States `(B, M, K, H)` of blocks at `anchors` `(B, M)` whose anchor tokens are `tokens` `(B, M)`."""
        batch, num_blocks = anchors.shape
        size = self.config.block_size
        ids = tokens.new_full((batch, num_blocks, size), self.mask_token_id)
        ids[..., 0] = tokens
        slots = torch.arange(size, device=anchors.device)
        positions = (anchors[..., None] + slots).flatten(1)
        hidden = self.target.embed(ids.flatten(1)).to(context[0][0].dtype)
        rotary = self.rotary_emb(hidden, positions)

        key_positions = torch.arange(context[0][0].shape[1], device=anchors.device)
        sees_context = key_positions < anchors.repeat_interleave(size, dim=1)[..., None]
        block_ids = torch.arange(num_blocks, device=anchors.device).repeat_interleave(size)
        sees_block = (block_ids[:, None] == block_ids).expand(batch, -1, -1)
        sees = torch.cat([sees_context, sees_block], dim=-1)[:, None]
        mask = mask_for(sees, context[0][1].dtype, *self.layers[0].self_attn.head_sizes)

        for layer, (keys, values) in zip(self.layers, context, strict=True):

            def attend(normed, layer=layer, keys=keys, values=values):
                own_keys, own_values = layer.self_attn.keys_values(normed, rotary)
                return torch.cat([keys, own_keys], dim=1), torch.cat([values, own_values], dim=1), mask

            hidden = layer(hidden, rotary, attend)
        return self.norm(hidden).unflatten(1, (num_blocks, size))[:, :, self.first_slot :]

    def propose(self, state, tokens, anchors, limit, choose: Chooser) -> Proposal:
        return self.proposal_of(self.block_states(state.up_to(limit), tokens, anchors), choose)

    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        context, grid = self._context(features, positions), lay_out(blocks, tokens)

        def draft(part: slice) -> torch.Tensor:
            return self.block_states(context, grid.tokens[:, part], grid.anchors[:, part])

        chains, recompute = grid.anchors.shape[1], self.gradient_checkpointing
        return draft_in_parts(draft, chains, self.blocks_per_chunk, recompute)[grid.cells]

    @torch.no_grad()
    def init_from_target(self, target: Target) -> Drafter:
        """
        Start from the target's last layers where shapes fit, with `fc` the mean of the taps.
        """
        last = layers_to_start_from(target.decoder, len(self.layers))
        for layer, source in zip(self.layers, last, strict=False):
            init_layer(layer, source)
        taps = len(self.target_layer_ids)
        eye = torch.eye(self.config.hidden_size, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
        self.fc.weight.copy_(eye.repeat(1, taps) / taps)
        copy_norm(self.norm, getattr(target.decoder, "norm", None))
        return self
