"""Logits → probabilities → tokens.

How sampling settings shape a distribution, and how tokens come of it. It does not know who proposed what.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Sampling(Protocol):
    """
    What is read here of [`SamplingParams`], which stands apart with its checks: this file travels with checkpoints.
    """

    temperature: float
    top_k: int
    top_p: float
    greedy: bool


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """
    The distribution that tokens are drawn from.

    Args:
        logits (`torch.Tensor` of shape `(…, V)`): Any float dtype.
        sampling ([`SamplingParams`]): Settings; at temperature 0 the result is a point mass on the argmax.

    Returns:
        `torch.Tensor` of shape `(…, V)`, float32, summing to 1 over the last dimension.
    """
    logits = logits.float()
    if sampling.greedy:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        # A token stays while the mass *before* it is below top_p, so the first always stays.
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, index, outside), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(probs: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One token of each distribution: `(…, V)` probabilities, normalised or not → `(…,)` ids."""
    flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
    return flat.reshape(probs.shape[:-1])


def draw_at(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[`draw`] from given uniforms `(…,)` in [0, 1) by inverting the cumulative sum, so that no other one matters."""
    # In float32 the sum over a large vocabulary would be coarser than what its rarest tokens have.
    mass = probs.cumsum(-1, dtype=torch.float64)
    # Kept off 1, where rounding could reach past the last token that has any mass.
    point = uniforms.double().clamp(max=1 - 1e-12)[..., None] * mass[..., -1:]
    return torch.searchsorted(mass, point, right=True)[..., 0]


class Chooser:
    """
    How a drafter turns its logits into proposals.

    Drafters propose their argmax by default; with `sampling` they draw, and verification needs the distribution they
    drew from. A drafter calls it once with all slots, or once a slot, in order: one for each block.

    Args:
        sampling ([`SamplingParams`], *optional*): What proposals are drawn at; their argmax by default.
        uniforms (`torch.Tensor` of shape `(B, M, K)`, *optional*): In [0, 1), one a slot; fresh ones by default.
    """

    def __init__(self, sampling: Sampling | None = None, uniforms: torch.Tensor | None = None) -> None:
        self.sampling, self.uniforms = sampling, uniforms
        self.slot = 0

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, M, K, DV)` or `(B, M, DV)` logits → draft ids, and probabilities unless proposals are point masses."""
        if self.sampling is None or self.sampling.greedy:
            return logits.argmax(-1), None
        probs = probabilities(logits, self.sampling)
        if self.uniforms is None:
            return draw(probs), probs
        uniforms = self.uniforms if logits.dim() == 4 else self.uniforms[..., self.slot]
        self.slot += 1
        return draw_at(probs, uniforms), probs
