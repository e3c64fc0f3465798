"""From divergences to a loss: chunks of slots, two streams, one reduction.

Training takes small chunks of slots, so that `[N, K, V]` is never held. They are checkpointed, or, where the head is
frozen, differentiated at once or given to TRL's kernel on CUDA. A loss of the drafter's own is computed in them too.
Knows no architectures and no rollouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .._trl_compat import ChunkedDivergenceFunction
from ..core.records import ReplayBatch
from ..core.vocabulary import to_draft_ids
from .divergences import LossSettings, StreamLosses, divergence
from .streams import dpace_weights


# Those that TRL's kernel computes.
KERNEL_LOSSES = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Heads:
    """
    How states become distributions.

    Args:
        draft_logits (`Callable`): Drafter states `(S, …)` → logits `(S, DV)`, in the dtype they are computed in.
        target_logits (`Callable`): Target states `(S, H)` → logits `(S, V)`, float32.
        vocab_map (`torch.LongTensor` of shape `(DV,)`, *optional*): Draft id → target id, ascending. The target is
            then renormalised over the draft vocabulary. A slot teaches nothing where what it would teach lies outside:
            the token, for losses that read one, else the target's most likely token. It carries no loss there, and
            for `accepted_length` that of a certain rejection.
        draft_weight (`torch.Tensor` of shape `(DV, S)`, *optional*): The drafter's head, where `draft_logits` is a
            product with it and nothing more.
        target_weight (`torch.Tensor` of shape `(V, H)`, *optional*): The same of the target.
        auxiliary (`Callable`, *optional*): A loss of the drafter's own, see [`Drafter.auxiliary_loss`].
        auxiliary_reads_target (`bool`, *optional*, defaults to `False`): It is given the target's distribution also
            where the teacher is its hard token alone; at temperature 1 where the teacher's is 0.
    """

    draft_logits: Callable[[torch.Tensor], torch.Tensor]
    target_logits: Callable[[torch.Tensor], torch.Tensor]
    vocab_map: torch.Tensor | None = None
    draft_weight: torch.Tensor | None = None
    target_weight: torch.Tensor | None = None
    auxiliary: Callable[..., dict[str, torch.Tensor]] | None = None
    auxiliary_reads_target: bool = False

    @classmethod
    def of(cls, drafter: Any, target: Any) -> Heads:
        """Those of a [`Drafter`] and its [`Target`]."""
        return cls(
            draft_logits=drafter.logits,
            target_logits=target.logits,
            vocab_map=drafter.vocab_map,
            draft_weight=drafter.linear_head,
            target_weight=target.linear_head,
            auxiliary=drafter.auxiliary_loss,
            auxiliary_reads_target=drafter.auxiliary_reads_target,
        )

    @property
    def separable(self) -> bool:
        """Whether a slot's loss trains nothing but its own state: the head is a product with a frozen weight."""
        frozen = self.draft_weight is not None and not self.draft_weight.requires_grad
        return frozen and self.auxiliary is None

    @cached_property
    def kept_target_weight(self) -> torch.Tensor:
        """The part of `target_weight` for tokens that the drafter has, `(DV, H)`; copied once for both streams."""
        return self.target_weight if self.vocab_map is None else self.target_weight[self.vocab_map]

    def read_target(self, settings: LossSettings) -> bool:
        """Whether the target's distribution is asked for, beside its hard token."""
        return self.auxiliary_reads_target or not settings.hard


# The loss of each slot, and by name what a drafter's own loss gives for each.
SlotLosses = tuple[torch.Tensor, dict[str, torch.Tensor]]


def _chunk_losses(
    hidden: torch.Tensor, states: torch.Tensor | None, tokens: torch.Tensor, heads: Heads, settings: LossSettings
) -> SlotLosses:
    draft_logps = heads.draft_logits(hidden).float().log_softmax(-1)
    target_logps, inside = None, None
    if heads.read_target(settings):
        with torch.no_grad():
            logits = heads.target_logits(states)
            if heads.vocab_map is not None:
                if not settings.reads_token:
                    _, inside = to_draft_ids(logits.argmax(-1), heads.vocab_map)
                logits = logits[:, heads.vocab_map]
            target_logps = (logits / (settings.temperature or 1.0)).log_softmax(-1)
    losses = divergence(draft_logps, target_logps, tokens, settings)
    auxiliary = {} if heads.auxiliary is None else heads.auxiliary(hidden, draft_logps, target_logps)
    return (losses, auxiliary) if inside is None else _taught_inside((losses, auxiliary), inside, settings)


def _taught_inside(found: SlotLosses, inside: torch.Tensor, settings: LossSettings) -> SlotLosses:
    """What is left where what slots would teach can be drafted (`inside`)."""
    losses, auxiliary = found
    auxiliary = {name: values.masked_fill(~inside, 0.0) for name, values in auxiliary.items()}
    return losses.masked_fill(~inside, settings.outside), auxiliary


class _Separable(torch.autograd.Function):
    """Losses `(S,)` that depend each on its own row of `hidden`, differentiated while their logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, losses_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            rows = hidden.detach().requires_grad_()
            losses = losses_of(rows)
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), rows))
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return (weights[:, None] * gradients).to(gradients.dtype), None


def uses_kernel(device: torch.device, heads: Heads, settings: LossSettings) -> bool:
    """
    Whether TRL's kernel takes a stream's slots: on CUDA, where it covers the case.

    A drafter's own head in training is left to the chunks: the kernel would return a float32 gradient of all of it for
    every chunk, which is more than it saves. So is a drafter with a loss of its own, which reads the distributions.
    """
    covered = settings.kind in KERNEL_LOSSES and heads.target_weight is not None
    return device.type == "cuda" and covered and heads.separable


def _kernel_losses(hidden: torch.Tensor, states: torch.Tensor, heads: Heads, settings: LossSettings) -> SlotLosses:
    """[`_chunk_losses`] in tiles of the vocabulary; keeps nothing for the backward pass but its arguments."""
    weight = heads.draft_weight
    losses, _ = ChunkedDivergenceFunction.apply(
        hidden.to(weight.dtype),
        weight,
        None,
        states,
        heads.kept_target_weight,
        None,
        {"forward_kl": 0.0, "reverse_kl": 1.0}.get(settings.kind, settings.beta),
        # Its temperature would divide the drafter's logits too; the scale of the teacher's logits does not.
        1.0,
        1.0,
        None,
        1 / settings.temperature,
    )
    if settings.max_clamp is not None:
        losses = losses.clamp(max=settings.max_clamp)
    if heads.vocab_map is not None:
        with torch.no_grad():
            _, inside = to_draft_ids(heads.target_logits(states).argmax(-1), heads.vocab_map)
        losses = losses.masked_fill(~inside, 0.0)
    return losses, {}


def slot_losses(
    hidden: torch.Tensor,
    states: torch.Tensor | None,
    tokens: torch.Tensor,
    heads: Heads,
    settings: LossSettings,
    chunk_size: int = 256,
) -> SlotLosses:
    """
    [`divergence`] without ever holding all logits: chunks of slots, projected again in the backward pass, unless the
    head is frozen: then gradients are taken at once, which spares a third of the products with it.

    Args:
        hidden (`torch.Tensor` of shape `(S, …)`): Drafter states, with gradients.
        states (`torch.Tensor` of shape `(S, H)`, *optional*): Target states before the head; unused where
            the teacher is its hard token, unless a drafter's own loss reads them.
        tokens (`torch.LongTensor` of shape `(S,)`): As in [`divergence`], already in the drafter's vocabulary.
        heads ([`Heads`]): The two heads.
        settings ([`LossSettings`]): Divergence, temperature, clamps.
        chunk_size (`int`, *optional*, defaults to `256`): Slots projected at once.

    Returns:
        `torch.Tensor` of shape `(S,)`, float32, and by name, as many values of the drafter's own loss.
    """
    parts, count = [], hidden.shape[0]
    in_kernel = count > 0 and uses_kernel(hidden.device, heads, settings)
    # No slots are one empty chunk, from which every parameter of the heads gets a gradient (of 0).
    for start in range(0, max(count, 1), chunk_size):
        part = slice(start, start + chunk_size)
        if in_kernel:
            parts.append(_kernel_losses(hidden[part], states[part], heads, settings))
            continue
        rest = (None if states is None else states[part], tokens[part], heads, settings)
        if heads.separable and torch.is_grad_enabled():
            parts.append((_Separable.apply(hidden[part], lambda rows, rest=rest: _chunk_losses(rows, *rest)[0]), {}))
        elif count > chunk_size and torch.is_grad_enabled():
            parts.append(checkpoint(_chunk_losses, hidden[part], *rest, use_reentrant=False))
        else:
            parts.append(_chunk_losses(hidden[part], *rest))
    losses, auxiliary = zip(*parts, strict=True)
    return torch.cat(losses), {name: torch.cat([found[name] for found in auxiliary]) for name in auxiliary[0]}


def stream_loss(
    hidden: torch.Tensor,
    states: torch.Tensor | None,
    tokens: torch.Tensor,
    weights: torch.Tensor,
    heads: Heads,
    settings: LossSettings,
    chunk_size: int = 256,
) -> SlotLosses:
    """
    Each block's weighted sum of one stream's slot losses.

    Args:
        hidden (`torch.Tensor` of shape `(N, K, …)`): Drafter states.
        states (`torch.Tensor` of shape `(N, K, H)`, *optional*): Target states, as in [`slot_losses`].
        tokens (`torch.LongTensor` of shape `(N, K)`): Target ids, as in [`divergence`].
        weights (`torch.Tensor` of shape `(N, K)`): 0 leaves a slot out. With `dpace_alpha` they are multiplied by
            [`dpace_weights`], which read the drafter as it stands and so are no part of the denominator.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32, differentiable even when no slot is supervised; and by name, detached,
        the weighted sum of what the drafter's own loss gives, of which `loss` is part of the former too.
    """
    chosen = (weights > 0).nonzero(as_tuple=True)  # once: a mask would be counted, and waited for, at every use
    by_slot = hidden.new_zeros(weights.shape, dtype=torch.float32)
    hidden, tokens = hidden[chosen], tokens[chosen]
    states = None if states is None else states[chosen]
    inside = None
    if heads.vocab_map is not None:
        tokens, inside = to_draft_ids(tokens, heads.vocab_map)
    found = slot_losses(hidden, states, tokens, heads, settings, chunk_size)
    if inside is not None and settings.reads_token:
        found = _taught_inside(found, inside, settings)
    losses, auxiliary = found
    by_slot[chosen] = losses
    if settings.kind == "accepted_length":
        by_slot = 1 - (1 - by_slot).cumprod(-1)
    if settings.dpace_alpha is not None:
        sure = token_probabilities(hidden, tokens, heads, chunk_size)
        confidence = torch.zeros_like(by_slot)
        confidence[chosen] = sure if inside is None else sure.masked_fill(~inside, 0.0)
        weights = weights * dpace_weights(confidence, weights > 0, settings.dpace_alpha)
    by_block = (by_slot * weights).sum(-1)
    if not auxiliary:
        return by_block, {}
    if "loss" in auxiliary:
        own = by_slot.new_zeros(weights.shape)
        own[chosen] = auxiliary["loss"].float()
        by_block = by_block + (own * weights).sum(-1)
    slot_weights = weights[chosen]
    return by_block, {name: (values.detach() * slot_weights).sum() for name, values in auxiliary.items()}


@torch.no_grad()
def token_probabilities(
    hidden: torch.Tensor, tokens: torch.Tensor, heads: Heads, chunk_size: int = 256
) -> torch.Tensor:
    """The drafter's probability `(S,)` of tokens of its vocabulary, in the chunks of [`slot_losses`]."""
    found = hidden.new_zeros(len(tokens), dtype=torch.float32)
    for start in range(0, len(tokens), chunk_size):
        part = slice(start, start + chunk_size)
        logps = heads.draft_logits(hidden[part]).float().log_softmax(-1)
        found[part] = logps.gather(-1, tokens[part, None])[:, 0].exp()
    return found


def draft_loss(drafter: Any, target: Any, batch: ReplayBatch, losses: StreamLosses) -> dict[str, Any]:
    """[`batch_loss`] of what a [`Drafter`] drafts now, with gradients, beside its [`Target`]."""
    hidden = drafter.draft(batch.features, batch.tokens, batch.blocks)
    return batch_loss(hidden, batch, Heads.of(drafter, target), losses)


def batch_loss(hidden: torch.Tensor, batch: ReplayBatch, heads: Heads, losses: StreamLosses) -> dict[str, Any]:
    """
    Loss of a micro-batch: both streams over the *global* denominator (Draft-OPD, section 3).

    Args:
        hidden (`torch.Tensor` of shape `(N, K, …)`): From `Drafter.draft`.
        batch ([`ReplayBatch`]): Labels, target states, weights, denominator.
        heads ([`Heads`]): The two heads.
        losses ([`StreamLosses`]): A divergence a stream.

    Returns:
        `loss` (scalar with gradients), and detached: sums `accepted_loss`, `rejected_loss` and, by name over both
        streams, `auxiliary`; `block_losses` `(N,)`.
    """
    accepted, rejected, chunk_size = losses.accepted, losses.rejected, losses.chunk_size
    text_states = batch.text_states if heads.read_target(accepted) else None
    on_accepted, auxiliary = stream_loss(
        hidden, text_states, batch.labels, batch.accepted_weights, heads, accepted, chunk_size
    )
    on_rejected = torch.zeros_like(on_accepted)
    if batch.draft_states is not None:
        tokens = batch.blocks.draft_tokens
        if rejected.teaches_token:
            tokens = hard_tokens(batch.draft_states, batch.rejected_weights, heads, chunk_size)
        on_rejected, more = stream_loss(
            hidden, batch.draft_states, tokens, batch.rejected_weights, heads, rejected, chunk_size
        )
        auxiliary = {name: value + more[name] for name, value in auxiliary.items()}
    by_block = on_accepted + on_rejected
    return {
        "loss": by_block.sum() / batch.denominator.clamp(min=1e-8),
        "accepted_loss": on_accepted.detach().sum(),
        "rejected_loss": on_rejected.detach().sum(),
        "auxiliary": auxiliary,
        "block_losses": by_block.detach(),
    }


@torch.no_grad()
def hard_tokens(states: torch.Tensor, weights: torch.Tensor, heads: Heads, chunk_size: int = 256) -> torch.Tensor:
    """The target's argmax `(N, K)` where `weights` is positive, 0 elsewhere."""
    chosen = (weights > 0).nonzero(as_tuple=True)
    tokens = torch.zeros(weights.shape, dtype=torch.long, device=weights.device)
    parts = [heads.target_logits(part).argmax(-1) for part in states[chosen].split(chunk_size)]
    if parts:
        tokens[chosen] = torch.cat(parts)
    return tokens
