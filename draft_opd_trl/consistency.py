"""Whether texts are the target's own, at a stated temperature: what the target says of them, token by token.

Replay is exact because the target wrote the text. Text of another model, another temperature or another tokenisation
breaks that without any error, so text from outside is held against the target. Knows no sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from .records import Rollout
from .sampling import SamplingParams, probabilities
from .target import Target


# Logits nearer than this, in nats, can swap places between kernels: bf16 keeps 8 bits, a step of 0.125 at 16 … 32.
NEAR_TIE = 0.5
# Stands for log 0: a token that top-k or top-p shut out, which rounding at their edge can do to the target's own text.
LOG_PROB_FLOOR = -23.0
# Smallest share of greedy tokens of a text the target wrote at temperature 0.
MIN_AGREEMENT = 0.99
# Largest distance of a text's log-probability from its expectation, in standard deviations. A single text has few
# rare tokens, so its tail is heavier than that of a sample of texts.
MAX_Z, MAX_Z_ONE_TEXT = 5.0, 8.0


@dataclass
class TextFit:
    """
    What the target says of completions, summed over their tokens.

    If a text is drawn from the target's law p, then E[log p(y_t) | text before] = −H_t with variance Var_t, both known
    from p alone, so Σ (log p(y_t) + H_t) is a martingale with mean 0 and variance Σ Var_t. `z` is that sum in standard
    deviations: far below 0 where the text is less likely than the target's own would be (another model, a higher
    temperature), far above where it is likelier (greedy or cooler text).

    Args:
        num_tokens, num_greedy (`torch.Tensor` of shape `(B,)`): Completion tokens; those the target would have taken
            greedily, near-ties included.
        log_prob, entropy, variance (`torch.Tensor` of shape `(B,)`): Sums of log p(y_t), H_t and Var_t in nats, under
            the stated sampling; under temperature 1 where that is greedy.
    """

    num_tokens: torch.Tensor
    num_greedy: torch.Tensor
    log_prob: torch.Tensor
    entropy: torch.Tensor
    variance: torch.Tensor

    @property
    def agreement(self) -> torch.Tensor:
        return self.num_greedy / self.num_tokens

    @property
    def z(self) -> torch.Tensor:
        # A text that is all but certain has next to no variance; below 1 nat a distance says nothing.
        return (self.log_prob + self.entropy) / self.variance.clamp(min=1.0).sqrt()

    def __len__(self) -> int:
        return len(self.num_tokens)

    def select(self, index: torch.Tensor) -> TextFit:
        return TextFit(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def cat(cls, parts: list[TextFit]) -> TextFit:
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def pooled(self) -> TextFit:
        """All texts as one."""
        return TextFit(*(getattr(self, field.name).sum() for field in fields(self)))

    def is_targets(self, sampling: SamplingParams, max_z: float = MAX_Z_ONE_TEXT) -> torch.Tensor:
        """`(B,)` bool: nothing speaks against the target having written the text."""
        return self.agreement >= MIN_AGREEMENT if sampling.greedy else self.z.abs() <= max_z


def _read_texts(target: Target, rollout: Rollout, batch_size: int = 8) -> Iterator[tuple[Rollout, torch.Tensor]]:
    """A few texts at a time, with the target's final states; bounds memory."""
    for start in range(0, len(rollout), batch_size):
        part = rollout.rows(start, start + batch_size)
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
    fits = []
    for part, states in _read_texts(target, rollout):
        positions = torch.arange(part.tokens.shape[1], device=states.device)
        written = (positions >= part.prompt_lengths[:, None]) & (positions < part.lengths[:, None])
        sums = torch.zeros((5, len(part)), device=states.device)
        for rows, places in zip(*(index.split(chunk_size) for index in written.nonzero().T), strict=True):
            logits = target.logits(states[rows, places - 1])
            tokens = part.tokens[rows, places][:, None]
            probs = probabilities(logits, law)
            log_probs = probs.log().clamp(min=LOG_PROB_FLOOR)
            entropy = -(probs * log_probs).sum(-1)
            variance = (probs * log_probs**2).sum(-1) - entropy**2
            greedy = logits.gather(1, tokens)[:, 0] >= logits.amax(-1) - NEAR_TIE
            log_prob = log_probs.gather(1, tokens)[:, 0]
            sums.index_add_(1, rows, torch.stack([torch.ones_like(entropy), greedy, log_prob, entropy, variance]))
        fits.append(sums)
    return TextFit(*torch.cat(fits, dim=1))


@torch.no_grad()
def likeliest_next(target: Target, rollout: Rollout, candidates: list[int]) -> list[int]:
    """Which of `candidates` the target would rather write after each text."""
    best = []
    for part, states in _read_texts(target, rollout):
        last = states[torch.arange(len(part), device=states.device), part.lengths - 1]
        best += target.logits(last)[:, candidates].argmax(-1).tolist()
    return [candidates[index] for index in best]


def describe_misfit(fit: TextFit, sampling: SamplingParams) -> str | None:
    """Why a sample of texts is not the target's own at the stated sampling, with numbers; `None` if it may be."""
    whole = fit.pooled()
    if whole.is_targets(sampling, MAX_Z):
        return None
    count = int(whole.num_tokens)
    found = f"mean log-probability {whole.log_prob / count:.3f} a token"
    if sampling.greedy:
        found = f"{whole.agreement:.1%} of their tokens are the target's greedy choice (its own text: 100 %), {found}"
    else:
        found += f" (its own text: {-whole.entropy / count:.3f}, {whole.z:+.0f} standard deviations away)"
        found += f", {whole.agreement:.1%} of the tokens greedy"
    return (
        f"The texts do not look like the target's own at temperature={sampling.temperature}: over {count} tokens of "
        f"{len(fit)} texts, {found}. Replay would then find errors that verification would not. Set "
        "`temperature`, `top_k` and `top_p` to what the texts were written with, check that this very target wrote "
        "them with this chat template (thinking on or off), or let it write them: rollout_source='speculation'."
    )
