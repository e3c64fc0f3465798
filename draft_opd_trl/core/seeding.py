"""Random numbers that depend on a text and what they decide, and not on its batch, its lane or what came before.

So texts and blocks can be drawn again alone, and no generator's state has to be saved.
"""

from __future__ import annotations

import hashlib
import zlib

import torch


def seed_of(*parts: object) -> int:
    """A seed that depends on all parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def text_generator(seed: int, step: int, tokens: torch.Tensor) -> torch.Generator:
    """A generator for one text `(T,)` at one optimizer step, whatever batch, rank or micro-step it falls in."""
    key = zlib.crc32(tokens.cpu().numpy().tobytes(), zlib.crc32(f"{seed}:{step}".encode()))
    return torch.Generator().manual_seed(key)


# What a random number of a text being decoded decides: whether a proposal is accepted, which token is committed, which
# one is proposed.
ACCEPT, COMMIT, PROPOSE = range(3)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# Of splitmix64 (Steele, Lea & Flood 2014): the step from one number to the next, then a shift and a factor a round.
_STEP = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def text_uniforms(seeds: torch.Tensor, positions: torch.Tensor, purpose: int) -> torch.Tensor:
    """
    Random numbers in [0, 1) that depend on a text's seed, a position in it and what they decide, and on nothing else.

    So neither the batch nor the lane nor what was decoded before matters, and a text can be written again alone. A
    position's numbers may be asked for again after a rejection before it: they had decided nothing.

    Args:
        seeds (`torch.LongTensor` of shape `(R,)`): One a text.
        positions (`torch.LongTensor` of shape `(R, Q)`): Of the tokens that are decided about.
        purpose (`int`): `ACCEPT`, `COMMIT` or `PROPOSE`.

    Returns:
        `torch.Tensor` of shape `(R, Q)`, float64.
    """

    def mixed(bits: torch.Tensor) -> torch.Tensor:
        for shift, factor in _ROUNDS:
            # The shift of a signed number drags its sign along.
            bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
        return bits

    bits = mixed(mixed(seeds + _STEP)[:, None] + (positions * 3 + purpose) * _STEP)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
