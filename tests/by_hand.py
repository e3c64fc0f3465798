"""What results are compared with: a transformer's pieces, slow and plain, and measurements small enough to count."""

import math

import torch

from draft_opd_trl.decoding.acceptance import AcceptanceReport


def rms(states, weight, eps):
    return states / torch.sqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(states, positions, theta):
    """Rotary embedding on `(S, heads, D)`: halves (x1, x2) turned by position · theta^(−2i/D)."""
    half = states.shape[-1] // 2
    angles = positions[:, None].float() * theta ** (-torch.arange(half).float() / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(queries, keys, values, sees=None):
    """Head by head: `(Q, heads, D)`, keys and values `(S, shared heads, D)`, `sees` `(Q, S)` → `(Q, heads · D)`."""
    heads, shared_heads, width = queries.shape[1], keys.shape[1], queries.shape[2]
    outputs = []
    for head in range(heads):
        shared = head * shared_heads // heads
        scores = queries[:, head] @ keys[:, shared].T / width**0.5
        if sees is not None:
            scores = scores.masked_fill(~sees, float("-inf"))
        outputs.append(scores.softmax(-1) @ values[:, shared])
    return torch.cat(outputs, dim=-1)


def report(accepted, lengths, slots=2):
    return AcceptanceReport(slots, [[7] * length for length in lengths], accepted, [True] * len(lengths), 1.0)


# Accepted runs of K = 2 in texts of 6 and 4 tokens.
BEFORE = report([[0, 1, 0, 0], [0, 0, 0]], [6, 4])
AFTER = report([[2, 1], [0, 1]], [6, 4])


# The drafter's and the target's distribution over three tokens.
Q, P = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)


def kl(first, second):
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))
