"""Whether texts are the target's own, at a stated temperature: what the target says of them, token by token.

Replay is exact because the target wrote the text. Text of another model, another temperature or another tokenisation
breaks that without any error, so text from outside is held against the target. Knows no sources.

A text is judged by likelihood ratios, Π q(y_t) / p(y_t): how much better another law q explains its tokens than the
target's own law p does. Where p is true, the expectation of that product is at most 1, whatever the length of the text
and whatever q. So (Markov) it exceeds 1 / α with a probability of at most α, with no normal approximation, and a
running product may be looked at after every text. q is the target's law made cooler or warmer, as another model's text
looks too warm, and greedy text too cool:

- **temperature > 0**: p is known exactly, and q ∝ p^a with `POWERS` a. This is the exponential martingale of
  Σ (log p(y_t) + H_t), the distance of a text's log-probability from its expectation.
- **temperature 0**: the target's text is its argmax, up to the last bits of other kernels. If two logits differ by
  `gap`, noise swaps them with a probability of at most exp(−(gap / σ)² / 2) / 2, which stands for p, and the argmax
  has p = 1. σ is what a bf16 server explains (`KERNEL_NOISE`). q is the softmax at `TEMPERATURES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch

from ..core.records import Rollout
from ..core.sampling import probabilities
from ..core.sampling_params import SamplingParams
from ..core.target import Target


# σ of the difference of two logits between kernels, in parts of the largest logit: a step of bf16's 8 bits. Servers
# run bf16, whatever the dtype here. Measured on the pocket target, fp32 against bf16: 0.6 of it.
KERNEL_NOISE = 2.0**-8
# Gaps up to so many σ are called ties where texts are described.
NEAR_TIE = 3.0
# Stands for log 0: a token that top-k or top-p shut out.
LOG_PROB_FLOOR = -23.0
# The other laws that text is held against: powers of a law that draws, softmax temperatures beside a greedy one.
POWERS = (1 / 1.5, 1 / 1.1, 1.1, 1.5)
TEMPERATURES = (0.1, 0.3, 1.0)
# At most one of so many texts of the target's own is called another's; the target writes it again, so it costs little.
TEXT_ODDS = 1e3
# So many texts pass on average before a running test raises a false alarm; a sample is called another's as rarely.
ALARM_ODDS = 1e6


@dataclass
class TextFit:
    """
    What the target says of completions, summed over their tokens.

    If a text is drawn from the target's law p, then E[log p(y_t) | text before] = −H_t with variance Var_t, both known
    from p alone, so Σ (log p(y_t) + H_t) is a martingale with mean 0 and variance Σ Var_t. `z` is that sum in standard
    deviations: far below 0 where the text is less likely than the target's own would be (another model, a higher
    temperature), far above where it is likelier (greedy or cooler text). It describes; `ratios` decide.

    Args:
        num_tokens, num_greedy (`torch.Tensor` of shape `(B,)`): Completion tokens; those the target would have taken
            greedily, near-ties included.
        log_prob, entropy, variance (`torch.Tensor` of shape `(B,)`): Sums of log p(y_t), H_t and Var_t in nats, under
            the stated sampling; under temperature 1 where that is greedy.
        ratios (`torch.Tensor` of shape `(B, A)`): Log-likelihood ratios of each other law to the target's.
    """

    num_tokens: torch.Tensor
    num_greedy: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor
    variance: torch.Tensor
    ratios: torch.Tensor

    @property
    def agreement(self) -> torch.Tensor:
        return self.num_greedy / self.num_tokens

    @property
    def z(self) -> torch.Tensor:
        # A text that is all but certain has next to no variance; below 1 nat a distance says nothing.
        return (self.log_prob + self.entropy) / self.variance.clamp(min=1.0).sqrt()

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, index: slice | torch.Tensor) -> TextFit:
        return TextFit(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def cat(cls, parts: list[TextFit]) -> TextFit:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def pooled(self) -> TextFit:
        """All texts as one."""
        return TextFit(*(getattr(self, field.name).sum(0, keepdim=True) for field in fields(self)))

    def is_targets(self, odds: float = TEXT_ODDS) -> torch.Tensor:
        """`(B,)` bool: nothing speaks against the target having written the text. Of its own, one in `odds` fails."""
        return self.ratios.logsumexp(-1) <= math.log(odds * self.ratios.shape[-1])


def _read_texts(target: Target, rollout: Rollout, batch_size: int = 8) -> Iterator[tuple[Rollout, torch.Tensor]]:
    """A few texts at a time, with the target's final states; bounds memory."""
    for start in range(0, len(rollout), batch_size):
        part = rollout.part(start, start + batch_size)
        yield part, target.forward_text(part.tokens, ())[1]


@torch.no_grad()
def text_fit(target: Target, rollout: Rollout, sampling: SamplingParams, chunk_size: int = 64) -> TextFit:
    """
    Hold completions against the target.

    Args:
        target ([`Target`]): Reads each text once.
        rollout ([`Rollout`]): The texts.
        sampling ([`SamplingParams`]): The law they are said to follow.
        chunk_size (`int`, *optional*, defaults to `64`): Positions projected to the vocabulary at once.
    """
    law = SamplingParams(1.0) if sampling.greedy else sampling
    others = TEMPERATURES if sampling.greedy else POWERS
    fits = []
    for part, states in _read_texts(target, rollout):
        positions = torch.arange(part.tokens.shape[1], device=states.device)
        written = (positions >= part.prompt_lengths[:, None]) & (positions < part.lengths[:, None])
        sums = torch.zeros((5 + len(others), len(part)), device=states.device)
        for texts, places in zip(*(index.split(chunk_size) for index in written.nonzero().T), strict=True):
            logits = target.logits(states[texts, places - 1])
            tokens = part.tokens[texts, places][:, None]
            probs = probabilities(logits, law)
            log_probs = probs.log().clamp(min=LOG_PROB_FLOOR)
            entropy = -(probs * log_probs).sum(-1)
            variance = (probs * log_probs**2).sum(-1) - entropy**2
            sigmas = _gap_in_sigmas(logits, tokens)
            log_prob = log_probs.gather(1, tokens)[:, 0]
            ratios = _greedy_ratios(logits, tokens, sigmas) if sampling.greedy else _ratios(logits, tokens, probs, law)
            sums.index_add_(
                1,
                texts,
                torch.stack([torch.ones_like(entropy), sigmas <= NEAR_TIE, log_prob, entropy, variance, *ratios]),
            )
        fits.append(sums)
    sums = torch.cat(fits, dim=1)
    return TextFit(*sums[:5], sums[5:].T)


def _gap_in_sigmas(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far below the largest logit a token's `(N, 1)` is, in units of what kernels explain."""
    noise = KERNEL_NOISE * logits.abs().amax(-1)
    return (logits.amax(-1) - logits.gather(1, tokens)[:, 0]) / noise.clamp(min=torch.finfo(noise.dtype).tiny)


def _greedy_ratios(logits: torch.Tensor, tokens: torch.Tensor, sigmas: torch.Tensor) -> list[torch.Tensor]:
    """log q(y) − log p(y) at temperature 0, `(N,)` for each q."""
    swap = torch.where(sigmas > 0, math.log(0.5) - sigmas**2 / 2, 0.0)
    return [(logits / other).log_softmax(-1).gather(1, tokens)[:, 0] - swap for other in TEMPERATURES]


def _ratios(
    logits: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor, sampling: SamplingParams
) -> list[torch.Tensor]:
    """log q(y) − log p(y) under a law that draws, `(N,)` for each q."""
    log_probs = probs.log()
    log_prob = log_probs.gather(1, tokens)[:, 0]
    outside = log_prob.isneginf()
    log_prob = log_prob.masked_fill(outside, LOG_PROB_FLOOR)
    ratios = [(power - 1) * log_prob - (power * log_probs).logsumexp(-1) for power in POWERS]
    if outside.any():
        # Whether a token is just inside top-k or top-p is for the last bits to say, and speaks for nobody.
        wider = SamplingParams(
            sampling.temperature,
            sampling.top_k and sampling.top_k + sampling.top_k // 8 + 1,
            1 - (1 - sampling.top_p) / 2,
        )
        beyond = probabilities(logits, wider).gather(1, tokens)[:, 0] == 0
        ratios = [torch.where(outside, -LOG_PROB_FLOOR * beyond, ratio) for ratio in ratios]
    return ratios


@torch.no_grad()
def likeliest_next(target: Target, rollout: Rollout, candidates: list[int]) -> list[int]:
    """Which of `candidates` the target would rather write after each text."""
    best = []
    for part, states in _read_texts(target, rollout):
        last = states[torch.arange(len(part), device=states.device), part.lengths - 1]
        best += target.logits(last)[:, candidates].argmax(-1).tolist()
    return [candidates[index] for index in best]


class Watch:
    """
    A running test (CUSUM) over likelihood ratios, which notices a change whenever it comes.

    For each other law a level rises by a text's log-ratio, and starts again where it falls below 0. While the texts
    are the target's, it takes `ALARM_ODDS` texts on average, or more, until a level reaches log(`ALARM_ODDS` · laws).
    Once they are not, it takes that divided by the mean ratio of a text.

    Args:
        num_laws (`int`): Ratios a text has.
    """

    def __init__(self, num_laws: int) -> None:
        self.levels = [0.0] * num_laws
        self.threshold = math.log(ALARM_ODDS * num_laws)

    def add(self, ratios: Sequence[float]) -> None:
        """One text more."""
        self.levels = [max(level, 0.0) + ratio for level, ratio in zip(self.levels, ratios, strict=True)]

    @property
    def calm(self) -> bool:
        """Nothing speaks against the texts of late."""
        return max(self.levels) <= 0

    @property
    def alarmed(self) -> bool:
        return max(self.levels) >= self.threshold


class ShareWatch(Watch):
    """
    A [`Watch`] over texts that are faulty or not.

    Args:
        allowed (`float`): Share that is faulty in the worst of times.
        suspected (`float`): Share that is to be noticed.
    """

    def __init__(self, allowed: float, suspected: float) -> None:
        super().__init__(1)
        self._good, self._bad = math.log((1 - suspected) / (1 - allowed)), math.log(suspected / allowed)

    def count(self, faulty: bool) -> None:
        """One text more."""
        self.add([self._bad if faulty else self._good])


def describe(fit: TextFit, sampling: SamplingParams) -> str:
    """What the target says of texts, in words and numbers."""
    whole = fit.pooled()
    count, agreement, log_prob, entropy, z = (
        value.item() for value in (whole.num_tokens, whole.agreement, whole.log_prob, whole.entropy, whole.z)
    )
    found = f"mean log-probability {log_prob / count:.3f} a token"
    if sampling.greedy:
        found = f"{agreement:.1%} of their tokens are the target's greedy choice (its own text: 100 %), {found}"
    else:
        found += f" (its own text: {-entropy / count:.3f}, {z:+.0f} standard deviations away)"
        found += f", {agreement:.1%} of the tokens greedy"
    return f"{count:.0f} tokens of {len(fit)} texts: {found}"


def describe_misfit(fit: TextFit, sampling: SamplingParams) -> str | None:
    """Why a sample of texts is not the target's own at the stated sampling, with numbers; `None` if it may be."""
    if fit.pooled().is_targets(ALARM_ODDS):
        return None
    return (
        f"The texts do not look like the target's own at temperature={sampling.temperature}: over "
        f"{describe(fit, sampling)}. Replay would then find errors that verification would not. Set "
        "`temperature`, `top_k` and `top_p` to what the texts were written with, check that this very target wrote "
        "them with this chat template (thinking on or off), or let it write them: rollout_source='speculation'."
    )
