"""DSpark: the block backbone, a bias by the token before each slot, and a head that tells how likely it is accepted.

One pass of the backbone, then slot by slot. In the flat layout that DeepSpec publishes and SGLang and vLLM load; its
config stands in `dspark_config.py`. Knows nothing of rollouts, losses or where anchors come from.
Source: DeepSpec's modelling and loss files (slot layout, heads, confidence target).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from .base import Drafter, Proposal, check_tensors
from .block_backbone import BlockDrafter
from .dspark_config import DSparkConfig
from .own_vocabulary import OwnVocabulary




# Modules beside the backbone's, and what is the target's: folders may hold copies.
_HEADS = ("markov_head", "confidence_head")
_LENT = ("embed_tokens", "lm_head")


class MarkovHead(nn.Module):
    """A bias on the logits, of low rank, by the token before a slot."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        rank, width, self.head_type = config.markov_rank, config.hidden_size, config.markov_head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size, bias=False)
        if self.head_type == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        elif self.head_type == "rnn":
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, memory: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden (`torch.Tensor` of shape `(…, Q, H)`): The backbone's states at slots that follow each other.
            tokens (`torch.LongTensor` of shape `(…, Q)`): The token before each.
            memory (`torch.Tensor` of shape `(…, r)`, *optional*): What an `rnn` head remembers of earlier slots.

        Returns:
            `torch.Tensor` of shape `(…, Q, S)`: `[h; e]`, the state and the token's embedding, and behind them what
            `markov_w2` reads, where that is not the embedding itself; and the memory after.
        """
        embedded = self.markov_w1(tokens).to(hidden.dtype)
        joined = torch.cat([hidden, embedded], dim=-1)
        if self.head_type == "vanilla":
            return joined, None
        if self.head_type == "gated":
            return torch.cat([joined, self.gate_proj(joined).sigmoid() * embedded], dim=-1), None
        memory, read = torch.zeros_like(embedded[..., 0, :]) if memory is None else memory, []
        for slot in range(tokens.shape[-1]):
            inputs = torch.cat([memory, embedded[..., slot, :], hidden[..., slot, :]], dim=-1)
            gate, candidate, output = self.joint_proj(inputs).chunk(3, dim=-1)
            memory = gate.sigmoid() * memory + (1 - gate.sigmoid()) * candidate.tanh()
            read.append(output.tanh())
        return torch.cat([joined, torch.stack(read, dim=-2)], dim=-1), memory


class ConfidenceHead(nn.Module):
    """The log-odds that a proposal is accepted, of `[h; e]` or of `h` alone."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.width = config.hidden_size + (config.markov_rank if config.confidence_head_with_markov else 0)
        self.proj = nn.Linear(self.width, 1)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.proj(states[..., : self.width])[..., 0]


class Qwen3DSparkModel(OwnVocabulary, BlockDrafter):
    """
    The DSpark draft model. It has no embedding and no head: both are the target's (see [`Drafter.bind`]), as engines
    take them whatever the folder holds. With a draft vocabulary it has the target's rows for it, frozen, in `lm_head`.

    Args:
        config ([`DSparkConfig`]): Shape, taps, block size, mask token and heads.
    """

    kind = "dspark"
    config_class = DSparkConfig
    # As published: weights of exp(−j / 4) for slots j = 0, 1, …
    sft_decay = math.exp(-1 / 4)

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__(config)
        self.markov_head = MarkovHead(config)
        if config.enable_confidence_head:
            self.confidence_head = ConfidenceHead(config)
        if config.draft_vocab_size != config.vocab_size:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
            self.lm_head.weight.requires_grad_(False)
        self.add_tables(config)
        self.post_init()

    @classmethod
    def made_for(cls, target: Target, init_from_target: bool = True, **options: Any) -> Drafter:
        drafter = super().made_for(target, init_from_target, **options)
        if drafter.vocab_map is not None:
            with torch.no_grad():
                drafter.lm_head.weight.copy_(target.head.weight[drafter.vocab_map])
        return drafter

    @classmethod
    def recognises(cls, config: dict[str, Any]) -> bool:
        return "DSparkDraftModel" in (config.get("architectures") or []) or super().recognises(config)

    @classmethod
    def canonical_tensors(cls, tensors: dict[str, torch.Tensor], config: DSparkConfig) -> dict[str, torch.Tensor]:
        # DeepSpec keeps copies of the target's, frozen; a drafter that borrows them drafts the same.
        lent = _LENT if config.draft_vocab_size == config.vocab_size else _LENT[:1]
        return {name: tensor for name, tensor in tensors.items() if name.split(".")[0] not in lent}

    @classmethod
    def from_drafter(cls, drafter: Drafter, markov_rank: int = 256, **overrides: Any) -> Drafter:
        """
        On the backbone of any drafter of blocks. The bias is zero and the anchor's slot proposes or not as there, so
        until it is trained it proposes what a drafter without heads proposed.

        Args:
            drafter ([`Drafter`]): Where to start.
            markov_rank (`int`, *optional*, defaults to `256`): Rank of the bias by the token before.
            overrides: Further config fields. `sample_from_anchor=True` moves every slot by one token, which training
                must learn anew.
        """
        if not isinstance(drafter, BlockDrafter):
            return super().from_drafter(drafter)
        cls.config_class.check_options(overrides)
        # Not its path either: an adapter would take the other's folder for its base.
        theirs, left = drafter.config, ("_name_or_path", "architectures", "auto_map", "dflash_config", "layer_types")
        fields = {name: value for name, value in theirs.to_dict().items() if name not in left}
        fields |= {"mask_token_id": theirs.mask_token_id, "target_layer_ids": theirs.target_layer_ids}
        fields |= {"sample_from_anchor": drafter.first_slot == 0, "markov_rank": markov_rank}
        made = cls(cls.config_class(**{**fields, **overrides})).to(drafter.device)
        backbone = {name: tensor for name, tensor in made.state_dict().items() if name.split(".")[0] not in _HEADS}
        copied = {name: tensor for name, tensor in drafter.state_dict().items() if name.split(".")[0] not in _HEADS}
        check_tensors(backbone, copied, f"the {drafter.kind} drafter to start from")
        made.load_state_dict(copied, strict=False)
        nn.init.zeros_(made.markov_head.markov_w2.weight)
        return made

    @property
    def first_slot(self) -> int:
        return 0 if self.config.sample_from_anchor else 1

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        hidden, rank = states[..., : self.config.hidden_size], self.config.markov_rank
        bias = self.markov_head.markov_w2(states[..., -rank:])
        if hasattr(self, "lm_head"):
            return self.lm_head(hidden) + bias
        head = self.target.head.weight
        return functional.linear(hidden.to(head.dtype), head) + bias

    def propose(self, state, tokens, anchors, limit, choose: Chooser) -> Proposal:
        hidden = self.block_states(state.up_to(limit), tokens, anchors)
        memory, steps = None, []
        for slot in range(self.num_draft_tokens):
            states, memory = self.markov_head(hidden[:, :, slot : slot + 1], tokens[..., None], memory)
            steps.append(choose(self.logits(states[:, :, 0])))
            tokens = self.to_target_ids(steps[-1][0])
        return self.join_steps(steps)

    def draft(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        first = tokens[blocks.texts, blocks.anchors][:, None]
        before = torch.cat([first, blocks.draft_tokens[:, :-1]], dim=1)
        return self.markov_head(super().draft(features, tokens, blocks), before)[0]

    @property
    def auxiliary_reads_target(self) -> bool:
        return self.config.enable_confidence_head

    @property
    def auxiliary_loss(self) -> Callable[..., dict[str, torch.Tensor]] | None:
        return self._confidence_loss if self.config.enable_confidence_head else None

    def _confidence_loss(
        self, states: torch.Tensor, draft_logps: torch.Tensor, target_logps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of the confidence with the chance that a proposal drawn here is accepted, Σ min(p, q)."""
        accepted = torch.minimum(draft_logps.detach(), target_logps).exp().sum(-1).clamp(max=1)
        told = self.confidence_head(states).float()
        loss = functional.binary_cross_entropy_with_logits(told, accepted, reduction="none")
        error = told.detach().sigmoid() - accepted
        return {"loss": loss, "acceptance": accepted, "confidence_bias": error, "confidence_error": error.abs()}
