"""The accept/reject rule of speculative decoding, and its reversal for text that is given.

Pure tensor functions. Knows no models, caches or drafter kinds.
Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; the reversal is derived in `docs/source/method.md`.
"""

from __future__ import annotations

import torch

from .sampling import draw_at


def leading_run(agree: torch.Tensor) -> torch.Tensor:
    """Length of the leading run of `True`: `(N, K)` bool → `(N,)` long."""
    return agree.long().cumprod(-1).sum(-1)


def verify_greedy(draft_tokens: torch.Tensor, target_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Verification at temperature 0.

    Args:
        draft_tokens (`torch.LongTensor` of shape `(N, K)`): Proposals.
        target_tokens (`torch.LongTensor` of shape `(N, K + 1)`): The target's argmax at each slot, then the bonus.

    Returns:
        `num_accepted` `(N,)` and the recovered or bonus token `(N,)`.
    """
    num_accepted = leading_run(draft_tokens == target_tokens[:, :-1])
    return num_accepted, target_tokens.gather(1, num_accepted[:, None])[:, 0]


def verify_sampled(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    uniforms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Exact rejection sampling: the committed tokens follow the target's law whatever was proposed.

    Args:
        draft_tokens (`torch.LongTensor` of shape `(N, K)`):
            Proposals.
        draft_probs (`torch.Tensor` of shape `(N, K, V)`, *optional*):
            What they were drawn from; `None` when each proposal is a point mass (an argmax).
        target_probs (`torch.Tensor` of shape `(N, K + 1, V)`):
            The target's distribution at each slot given the drafted prefix, then at the bonus slot.
        uniforms (`torch.Tensor` of shape `(N, K + 1)`, *optional*):
            In [0, 1): one decides each proposal, the last draws the token after the run. Fresh ones by default.

    Returns:
        `num_accepted` `(N,)` and the recovered or bonus token `(N,)`.
    """
    count, num_draft_tokens = draft_tokens.shape
    if uniforms is None:
        uniforms = torch.rand((count, num_draft_tokens + 1), dtype=torch.float64, device=target_probs.device)
    if num_draft_tokens == 0:
        return draft_tokens.new_zeros(count), draw_at(target_probs[:, 0], uniforms[:, 0])
    proposal = draft_tokens[..., None]
    p_target = target_probs[:, :-1].gather(-1, proposal)[..., 0]
    p_draft = torch.ones_like(p_target) if draft_probs is None else draft_probs.gather(-1, proposal)[..., 0]
    num_accepted = leading_run(uniforms[:, :-1] * p_draft < p_target)

    slot = num_accepted[:, None, None].expand(-1, 1, target_probs.shape[-1])
    final_probs = target_probs.gather(1, slot)[:, 0]
    rejected = num_accepted < num_draft_tokens
    first_rejected = num_accepted.clamp(max=num_draft_tokens - 1)
    if draft_probs is None:
        token = draft_tokens.gather(1, first_rejected[:, None])
        residual = final_probs.scatter(-1, token, 0.0)
    else:
        residual = (final_probs - draft_probs.gather(1, first_rejected[:, None, None].expand_as(slot))[:, 0]).clamp(0)
    # Rounding can empty the residual of a slot that was rejected against the odds; the target's law is the limit.
    usable = rejected & (residual.sum(-1) > 0)
    return num_accepted, draw_at(torch.where(usable[:, None], residual, final_probs), uniforms[:, -1])


def judge_against_text(draft_tokens: torch.Tensor, labels: torch.Tensor, num_valid: torch.Tensor) -> torch.Tensor:
    """
    Verification reversed for given text: what it would have said of point-mass proposals.

    A proposal that puts all its mass on one token is accepted exactly when the text holds that token, at any
    temperature, because the text's law does not depend on the drafter.

    Args:
        draft_tokens (`torch.LongTensor` of shape `(N, K)`): Proposals.
        labels (`torch.LongTensor` of shape `(N, K)`): Text tokens at the same slots.
        num_valid (`torch.LongTensor` of shape `(N,)`): Slots inside the text.

    Returns:
        `num_accepted` `(N,)`.
    """
    slots = torch.arange(draft_tokens.shape[1], device=draft_tokens.device)
    return leading_run((draft_tokens == labels) & (slots < num_valid[:, None]))


def couple_to_text(
    draft_probs: torch.Tensor, target_probs: torch.Tensor, labels: torch.Tensor, uniforms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Verification reversed for given text: a proposal drawn from its law given the token that verification committed.

    The maximal coupling that rejection sampling builds, read backwards. With q the drafter's and p the target's
    distribution, the text token y was the accepted proposal with probability min(1, q(y) / p(y)); otherwise the
    proposal was another token, of law (q − p)₊. With y of law p, proposals are of law q.

    Args:
        draft_probs (`torch.Tensor` of shape `(…, V)`): What proposals are drawn from.
        target_probs (`torch.Tensor` of shape `(…, V)`): What the text was drawn from. Over a draft vocabulary these
            are the target's own probabilities of its tokens, not renormalised.
        labels (`torch.LongTensor` of shape `(…,)`): The text's tokens, negative where the drafter has none such. A
            proposal that no text token binds has a negative label and a target distribution of zeros.
        uniforms (`torch.Tensor` of shape `(…, 2)`): In [0, 1); one decides acceptance, one the rejected token.

    Returns:
        Proposals `(…,)` and whether each was accepted `(…,)`.
    """
    index = labels.clamp(min=0)[..., None]
    p_draft, p_target = (probs.gather(-1, index)[..., 0] for probs in (draft_probs, target_probs))
    accepted = (labels >= 0) & (uniforms[..., 0] * p_target < p_draft)
    residual = (draft_probs - target_probs).clamp(min=0)
    # Rounding can empty the residual of a slot that was rejected against the odds.
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, draft_probs)
    return torch.where(accepted, index[..., 0], draw_at(residual, uniforms[..., 1])), accepted
