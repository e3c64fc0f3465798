"""Divergences of a drafter from its target, slot by slot, from dense log-probabilities: the readable reference.

Knows no models, no streams and no chunks.
Sources: Draft-OPD (arXiv 2605.29343) section 3 for the sampled estimators; GKD (arXiv 2306.13649) for JSD; DeepSpec
for the mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.checks import one_of, settle
from ..core.errors import InputError
from ..core.limits import LIMITS


LOSSES = (
    "ce",
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tv",
    "log_acceptance",
    "lk",
    "accepted_length",
    "ce_tv",
    "bernoulli_forward_kl",
    "k3",
)
# The paper's estimators, which read one token of each slot.
SAMPLED_LOSSES = ("bernoulli_forward_kl", "k3")
# Those that mean something when the target is a point mass.
HARD_LOSSES = ("ce", "tv", "lk", "accepted_length", "ce_tv")


@dataclass(frozen=True)
class LossSettings:
    """
    One stream's divergence.

    Args:
        kind (`str`):
            `ce`: cross-entropy of the teacher's hard token. Exact over the vocabulary: `forward_kl` (target ‖
            drafter), `reverse_kl` (drafter ‖ target), `jsd`; with acceptance α = Σ min: `tv` (1 − α),
            `log_acceptance` (−log α), `lk` (forward KL and `tv`, blended by exp(−3α)) and `accepted_length` (one minus
            the chance that this slot and all before it are accepted). `ce_tv` is DeepSpec's mixture: 0.1 of `ce` and
            1.8 of `tv`. The paper's estimators, which read one token only:
            `bernoulli_forward_kl`, `k3`.
        temperature (`float`):
            Teacher temperature; 0 makes the target a point mass on the hard token, which leaves `ce`, `tv`, `lk`,
            `ce_tv` and `accepted_length` meaningful.
        beta (`float`, *optional*, defaults to `0.5`):
            Interpolation of `jsd`: near 0 it acts like forward, near 1 like reverse KL.
        max_clamp (`float`, *optional*):
            Ceiling of a slot's loss.
        log_prob_min_clamp (`float`, *optional*):
            Floor of the log-probabilities the sampled estimators read.
        dpace_alpha (`float`, *optional*):
            α of [`dpace_weights`], by which [`stream_loss`] weighs slots.
    """

    kind: str
    temperature: float
    beta: float = 0.5
    max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    dpace_alpha: float | None = None

    def __post_init__(self) -> None:
        settle(self, LIMITS, kind=one_of(*LOSSES))
        if self.temperature == 0 and self.kind not in HARD_LOSSES:
            raise InputError(
                f"Loss {self.kind!r} compares distributions, but teacher temperature 0 makes the target a point mass. "
                f"Use one of {', '.join(HARD_LOSSES)}, or set `teacher_temperature` above 0."
            )

    @property
    def hard(self) -> bool:
        """Whether the teacher is its hard token alone."""
        return self.kind == "ce" or self.temperature == 0

    @property
    def outside(self) -> float:
        """
        The loss where what a slot would teach lies outside the draft vocabulary: nothing can be learnt there, but a
        run of accepted slots ends there for certain.
        """
        return float(self.kind == "accepted_length")

    @property
    def reads_token(self) -> bool:
        """Whether one token of each slot is read."""
        return self.teaches_token or self.kind in SAMPLED_LOSSES

    @property
    def teaches_token(self) -> bool:
        """Whether that is the teacher's hard token."""
        return self.hard or self.kind == "ce_tv"


@dataclass(frozen=True)
class StreamLosses:
    """
    What the two streams teach.

    Args:
        accepted, rejected ([`LossSettings`]): Divergence of each stream; `accepted_length` is the former's alone.
        chunk_size (`int`, *optional*, defaults to `256`): Slots projected to the vocabulary at once.
    """

    accepted: LossSettings
    rejected: LossSettings
    chunk_size: int = 256


def divergence(
    draft_logps: torch.Tensor,
    target_logps: torch.Tensor | None,
    tokens: torch.Tensor,
    settings: LossSettings,
) -> torch.Tensor:
    """
    The loss of each slot, from dense log-probabilities. This is the reference: a few lines a divergence.

    Args:
        draft_logps (`torch.Tensor` of shape `(S, V)`): Drafter, float32.
        target_logps (`torch.Tensor` of shape `(S, V)`, *optional*): Target at the teacher temperature; unused where
            the teacher is its hard token.
        tokens (`torch.LongTensor` of shape `(S,)`): The hard token (also of `ce_tv`), the text token
            (`bernoulli_forward_kl`) or the drafted token (`k3`).

    Returns:
        `torch.Tensor` of shape `(S,)`, in nats; `tv` and `accepted_length`, which [`stream_loss`] accumulates over a
        block, are the probability of rejecting a proposal drawn from the drafter.
    """
    if settings.reads_token:
        log_q = draft_logps.gather(-1, tokens[:, None])[:, 0]
    if settings.kind == "ce":
        loss = -log_q
    elif settings.kind == "forward_kl":
        loss = _kl(target_logps, draft_logps)
    elif settings.kind == "reverse_kl":
        loss = _kl(draft_logps, target_logps)
    elif settings.kind == "log_acceptance":
        loss = -torch.minimum(draft_logps, target_logps).logsumexp(-1)
    elif settings.kind in ("tv", "lk", "accepted_length", "ce_tv"):
        loss = 1 - (log_q.exp() if settings.hard else torch.minimum(draft_logps, target_logps).exp().sum(-1))
        if settings.kind == "lk":
            share = torch.exp(-3 * (1 - loss.detach()))
            loss = share * (-log_q if settings.hard else _kl(target_logps, draft_logps)) + (1 - share) * loss
        elif settings.kind == "ce_tv":
            loss = 1.8 * loss - 0.1 * log_q
    elif settings.kind == "jsd":
        loss = _jsd(draft_logps, target_logps, settings.beta)
    else:
        log_p = target_logps.gather(-1, tokens[:, None])[:, 0]
        if settings.log_prob_min_clamp is not None:
            log_p, log_q = (value.clamp(min=settings.log_prob_min_clamp) for value in (log_p, log_q))
        if settings.kind == "k3":
            ratio = log_p - log_q
            loss = ratio.exp() - 1 - ratio
        else:
            loss = _bernoulli_forward_kl(log_p, log_q)
    return loss if settings.max_clamp is None else loss.clamp(max=settings.max_clamp)


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """KL(first ‖ second) from log-probabilities, over the last dimension."""
    return (first.exp() * (first - second)).sum(-1)


def _jsd(draft_logps: torch.Tensor, target_logps: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalised JSD with mixture β·target + (1 − β)·drafter; its ends are forward (0) and reverse (1) KL."""
    if beta == 0:
        return _kl(target_logps, draft_logps)
    if beta == 1:
        return _kl(draft_logps, target_logps)
    mixture = (beta * target_logps.exp() + (1 - beta) * draft_logps.exp()).clamp_min(1e-30).log()
    return beta * _kl(target_logps, mixture) + (1 - beta) * _kl(draft_logps, mixture)


def _bernoulli_forward_kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p(log p − log q) + (1 − p)(log(1 − p) − log(1 − q)): the paper's estimate from the text token alone."""
    tiny = 1e-6
    p, q = log_p.exp().clamp(tiny, 1 - tiny), log_q.exp().clamp(tiny, 1 - tiny)
    return p * (p.log() - q.log()) + (1 - p) * ((1 - p).log() - (1 - q).log())
