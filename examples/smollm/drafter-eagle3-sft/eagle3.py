"""EAGLE-3: a one-layer drafter that reads its own hidden state back, token by token, over a vocabulary of its own.

The model, in the flat layout that SpecForge and SafeAILab publish and SGLang and vLLM load; its config stands in
`eagle3_config.py`. Knows nothing of rollouts, losses or where anchors come from.
Sources: EAGLE-3 (arXiv 2503.01840) and its published checkpoints (layout, pairing, positions); EAGLE 3.1
(arXiv 2605.09992) for `fc_norm` and `norm_output`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from .base import Drafter, Proposal
from .eagle3_config import NUM_TAPS, Eagle3Config, default_layer_ids
from .own_vocabulary import OwnVocabulary
from .parts import (
    copy_norm,
    draft_in_parts,
    in_dtype_of,
    init_layer,
    lay_out,
    layers_to_start_from,
    plain_weight,
    rotate,
)




class Eagle3Attention(nn.Module):
    """Each chain attends to its own part of a shared context, and to its own earlier steps."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim, self.kv_heads = config.head_dim, config.num_key_value_heads
        width, bias = config.num_attention_heads * self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(2 * config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(2 * config.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim))

    def keys_values(
        self, inputs: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys and values `(B, Q, kv_heads, head_dim)` of inputs `(B, Q, 2H)`."""
        return rotate(self._split(self.k_proj(inputs)), *rotary), self._split(self.v_proj(inputs))

    def forward(
        self,
        inputs: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        steps: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> torch.Tensor:
        """
        Args:
            inputs (`torch.Tensor` of shape `(B, M, 2H)`): One step of M chains.
            context: Keys and values `(B, kv_heads, S, head_dim)` and what each chain sees of them `(B, M, S)`.
            steps: Keys and values `(B, M, kv_heads, head_dim)` of the chains' steps so far, this one included.
        """
        keys, values, sees = context
        queries = rotate(self._split(self.q_proj(inputs)), *rotary) * self.head_dim**-0.5
        queries = queries.unflatten(2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        grid = queries.shape[2:4]
        # Two parts of one softmax: own steps beside the context, so that neither is copied for the other.
        on_context = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, grid)
        on_context = on_context.masked_fill(~sees[:, None, None], float("-inf"))
        on_steps = torch.einsum("bhgmd,bmshd->bhgms", queries, torch.stack([keys for keys, _ in steps], dim=2))
        weights = torch.cat([on_context, on_steps], dim=-1).softmax(-1, dtype=torch.float32).to(values.dtype)
        on_context, on_steps = weights.split([keys.shape[2], len(steps)], dim=-1)
        attended = (on_context.flatten(2, 3) @ values).unflatten(2, grid)
        attended = attended + torch.einsum(
            "bhgms,bmshd->bhgmd", on_steps, torch.stack([values for _, values in steps], dim=2)
        )
        return self.o_proj(attended.permute(0, 3, 1, 2, 4).flatten(2))


class Eagle3Layer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Eagle3Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def join(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Attention inputs `(…, 2H)` from token embeddings and hidden states `(…, H)`."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)

    def forward(self, inputs, hidden, rotary, context, steps) -> torch.Tensor:
        residual = inputs[..., hidden.shape[-1] :] if self.norm_before_residual else hidden
        hidden = residual + self.self_attn(inputs, rotary, context, steps)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


@dataclass
class Eagle3State:
    """
    What committed text leaves behind, by position t: the feature of t, keys and values of its pair with token t + 1.

    Args:
        hidden (`torch.Tensor` of shape `(B, S, H)`): Taps through `fc`.
        keys, values (`torch.Tensor` of shape `(B, kv_heads, S, head_dim)`): Of the pairs.
    """

    hidden: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class LlamaForCausalLMEagle3(OwnVocabulary, Drafter):
    """
    The EAGLE-3 draft model.

    Args:
        config ([`Eagle3Config`]): Shape, taps, draft vocabulary.
    """

    kind = "eagle3"
    config_class = Eagle3Config
    sft_decay = 0.8
    # Chains of a text drafted side by side with gradients; more than this many are recomputed in the backward pass.
    chains_per_chunk = 64

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        if config.own_embeddings or config.hidden_size != config.target_hidden_size:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            # Where the widths agree SGLang serves the target's own embeddings whatever the folder holds.
            self.embed_tokens.weight.requires_grad_(config.hidden_size != config.target_hidden_size)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                LlamaRMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in range(NUM_TAPS)
            )
        self.fc = nn.Linear(NUM_TAPS * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.add_tables(config)
        self.post_init()

    @classmethod
    def recognises(cls, config: dict[str, Any]) -> bool:
        names = config.get("architectures") or []
        # SafeAILab's folders name plain Llama; only a draft vocabulary tells them from a target's.
        plain = "LlamaForCausalLM" in names and "draft_vocab_size" in config
        return plain or "Eagle3LlamaForCausalLM" in names or super().recognises(config)

    @classmethod
    def canonical_tensors(cls, tensors: dict[str, torch.Tensor], config: Eagle3Config) -> dict[str, torch.Tensor]:
        if config.own_embeddings is False and config.hidden_size == config.target_hidden_size:
            tensors = {name: tensor for name, tensor in tensors.items() if name != "embed_tokens.weight"}
        config.own_embeddings = "embed_tokens.weight" in tensors
        renamed = {}
        for name, tensor in tensors.items():
            layer, rest = name[: len("layers.0.")], name[len("layers.0.") :]
            # A folder that spells one tensor both ways keeps the odd one out, and the key check names it.
            alias = f"midlayer.{rest}"
            renamed[alias if layer == "layers.0." and alias not in tensors else name] = tensor
        trivial = {"d2t": 0, "t2d": 1}
        if config.draft_vocab_size == config.vocab_size:
            renamed = {
                name: tensor
                for name, tensor in renamed.items()
                if name not in trivial or not bool((tensor == trivial[name]).all())
            }
        return renamed

    def speculators_tensors(
        self, tensors: dict[str, torch.Tensor], target_embedding: Callable[[], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # `speculators` numbers the layers of every kind, and fills an embedding that is not there with noise.
        renamed = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
        if "embed_tokens.weight" not in renamed:
            renamed["embed_tokens.weight"] = target_embedding().to(self.fc.weight.dtype)
        return renamed

    @property
    def target_layer_ids(self) -> list[int]:
        return self.config.target_layer_ids or default_layer_ids(self.target.num_layers)

    @property
    def num_draft_tokens(self) -> int:
        return self.config.num_draft_tokens

    def fit(self, target: TargetShape) -> None:
        if self.config.eagle_aux_hidden_state_layer_ids is None:
            taps = default_layer_ids(target.num_layers)
            self.config.eagle_aux_hidden_state_layer_ids = [index + 1 for index in taps]
        super().fit(target)

    def check_target(self, target: TargetShape) -> None:
        config, faults = self.config, []
        if config.target_hidden_size != target.hidden_size:
            faults.append(
                f"drafter target_hidden_size {config.target_hidden_size} is not the target's {target.hidden_size}"
            )
        if config.vocab_size != target.vocab_size:
            faults.append(f"drafter vocab_size {config.vocab_size} is not the target's {target.vocab_size}")
        ids = config.target_layer_ids
        inside = [index for index in sorted(set(ids)) if 0 <= index < target.num_layers - 1]
        if ids != inside or len(ids) != NUM_TAPS:
            faults.append(
                f"target_layer_ids {ids} must name {NUM_TAPS} of the layers 0 … {target.num_layers - 2} in ascending "
                "order (the last layer's output is normed in some engines and not in others)"
            )
        self.refuse_misfit(faults, target)

    def get_output_embeddings(self) -> nn.Module:
        # Asked for by adapters on all matrices, which leave the head alone.
        return self.lm_head

    @property
    def linear_head(self) -> torch.Tensor | None:
        return plain_weight(self.lm_head)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(states.to(self.lm_head.weight.dtype))

    def _embed(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        # Raw rows, as the engines lend them: without the scale that Gemma's own embedding applies.
        if hasattr(self, "embed_tokens"):
            return self.embed_tokens(tokens).to(like.dtype)
        return nn.functional.embedding(tokens, self.target.embedding.weight).to(like.dtype)

    # -- context ------------------------------------------------------------------------------------------------

    def _context(
        self, features: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fused features `(R, Q, H)`, and keys and values of their pairs with the `tokens` `(R, Q)` that follow."""
        features = in_dtype_of(self.fc.weight, features)
        if self.config.fc_norm:
            parts = zip(self.fc_norm, features.chunk(NUM_TAPS, dim=-1), strict=True)
            features = torch.cat([norm(part) for norm, part in parts], dim=-1)
        hidden = self.fc(features)
        inputs = self.midlayer.join(self._embed(tokens, hidden), hidden)
        return hidden, *self.midlayer.self_attn.keys_values(inputs, self.rotary_emb(inputs, positions))

    def start(self, batch_size: int, max_length: int) -> Eagle3State:
        weight, attention = self.fc.weight, self.midlayer.self_attn
        shape = (batch_size, attention.kv_heads, max_length, attention.head_dim)
        hidden = weight.new_zeros((batch_size, max_length, self.config.hidden_size))
        return Eagle3State(hidden, weight.new_zeros(shape), weight.new_zeros(shape))

    def extend(self, state, features, positions, tokens, lanes=None) -> None:
        if lanes is None:
            lanes = torch.arange(positions.shape[0], device=positions.device)
        following = tokens.gather(1, (positions + 1).clamp(max=tokens.shape[1] - 1))
        hidden, keys, values = self._context(features, positions, following)
        place = lanes[:, None]
        state.hidden[place, positions] = hidden.to(state.hidden.dtype)
        state.keys[place, :, positions] = keys.to(state.keys.dtype)
        state.values[place, :, positions] = values.to(state.values.dtype)

    # -- drafting -----------------------------------------------------------------------------------------------

    def _chains(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        anchors: torch.Tensor,
        read: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """
        States `(B, M, K, H)` of chains drafted in lockstep.

        An anchor's own feature comes only with its verification. So the first step pairs the feature before it with
        the anchor's token, at the position before it, and sees the pairs before that one.

        Args:
            hidden, keys, values: Of the context, as in [`Eagle3State`].
            tokens, anchors (`torch.LongTensor` of shape `(B, M)`): Anchor tokens and their positions.
            read: `read(k, states of slot k)` gives the token `(B, M)` that the step after slot k reads.
        """
        first = (anchors - 1).clamp(min=0)
        sees = torch.arange(keys.shape[2], device=anchors.device) < first[..., None]
        hidden = hidden.gather(1, first[..., None].expand(-1, -1, hidden.shape[-1]))
        steps, states = [], []
        for slot in range(1, self.num_draft_tokens + 1):
            inputs = self.midlayer.join(self._embed(tokens, hidden), hidden)
            rotary = self.rotary_emb(inputs, first + slot - 1)
            steps.append(self.midlayer.self_attn.keys_values(inputs, rotary))
            hidden = self.midlayer(inputs, hidden, rotary, (keys, values, sees), steps)
            states.append(self.norm(hidden))
            if self.config.norm_output:
                hidden = states[-1]
            if slot < self.num_draft_tokens:
                tokens = read(slot, states[-1])
        return torch.stack(states, dim=2)

    def propose(self, state, tokens, anchors, limit, choose: Chooser) -> Proposal:
        steps = []

        def draft(slot: int, states: torch.Tensor) -> torch.Tensor:
            steps.append(choose(self.logits(states)))
            return self.to_target_ids(steps[-1][0])

        context = state.hidden[:, :limit], state.keys[:, :, :limit], state.values[:, :, :limit]
        states = self._chains(*context, tokens, anchors, draft)
        draft(self.num_draft_tokens, states[:, :, -1])
        return self.join_steps(steps)

    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden, keys, values = self._context(features, positions, tokens.roll(-1, dims=1))
        context, grid = (hidden, keys.transpose(1, 2), values.transpose(1, 2)), lay_out(blocks, tokens)

        def draft(part: slice) -> torch.Tensor:
            given = grid.drafted[:, part]
            return self._chains(
                *context, grid.tokens[:, part], grid.anchors[:, part], lambda slot, _: given[..., slot - 1]
            )

        chains, chunk = grid.anchors.shape[1], self.chains_per_chunk
        return draft_in_parts(draft, chains, chunk, self.gradient_checkpointing or chains > chunk)[grid.cells]

    @torch.no_grad()
    def init_from_target(self, target: Target) -> LlamaForCausalLMEagle3:
        """
        Start from the target's last layer and head where shapes fit, with `fc` the mean of the taps.

        The half of q, k and v that reads the token's embedding stays random: the target has no such part.
        """
        for source in layers_to_start_from(target.decoder, 1):
            init_layer(self.midlayer, source)
            copy_norm(self.midlayer.hidden_norm, getattr(source, "input_layernorm", None))
        copy_norm(self.norm, getattr(target.decoder, "norm", None))
        width = self.config.hidden_size
        if self.config.target_hidden_size == width:
            eye = torch.eye(width, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
            self.fc.weight.copy_(eye.repeat(1, NUM_TAPS) / NUM_TAPS)
            rows = target.head.weight
            self.lm_head.weight.copy_(rows if self.vocab_map is None else rows[self.vocab_map])
            if hasattr(self, "embed_tokens"):
                self.embed_tokens.weight.copy_(target.embedding.weight)
        return self
