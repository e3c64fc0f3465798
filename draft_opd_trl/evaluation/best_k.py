"""How many proposals to serve with: acceptance by slot against what a round costs, for each batch size.

Arithmetic alone. Knows no models, engines or clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import InputError


@dataclass(frozen=True)
class Choice:
    """
    What serving with K proposals a round comes to.

    Args:
        num_draft_tokens (`int`): K; 0 is decoding without a drafter.
        acceptance_length (`float`): τ, tokens a round and text.
        seconds (`float`): Of a round of the whole batch.
        speedup (`float`): Tokens a second over those of K = 0.
    """

    num_draft_tokens: int
    acceptance_length: float
    seconds: float
    speedup: float


def choices(by_slot: Sequence[float], seconds: Mapping[int, float]) -> list[Choice]:
    """
    Every K whose round was timed, least first.

    A round of K commits 1 + Σ_{k ≤ K} (share of blocks whose first k proposals were all accepted) tokens. The shares
    are those of the blocks of the K that was measured; with another K blocks begin elsewhere, and this neglects it.

    Args:
        by_slot (`Sequence[float]`): These shares, from k = 1 on ([`AcceptanceReport.acceptance_by_slot`]).
        seconds (`Mapping[int, float]`): K → seconds of a round at one batch size; 0 is decoding without a drafter.

    Raises:
        `ValueError`: There is no round without a drafter to compare with, or a K beyond the shares.
    """
    if 0 not in seconds or max(seconds) > len(by_slot):
        raise InputError(
            f"Rounds of K = {sorted(seconds)} cannot be compared by the acceptance of {len(by_slot)} slots. Time "
            "K = 0, which is decoding without a drafter, and none beyond the slots."
        )
    lengths = {k: 1 + sum(by_slot[:k]) for k in sorted(seconds)}
    return [Choice(k, tau, seconds[k], tau * seconds[0] / seconds[k]) for k, tau in lengths.items()]


def best(some: Sequence[Choice]) -> Choice:
    """The fastest; of equals the one with the fewest proposals."""
    return max(some, key=lambda one: (one.speedup, -one.num_draft_tokens))


def on_a_line(timed: Mapping[int, float], ks: Sequence[int]) -> dict[int, float]:
    """
    Seconds of a round at further K, on the straight line (least squares) through those of the K > 0 that were timed.

    Args:
        timed (`Mapping[int, float]`): K → seconds; at least two K > 0. K = 0 runs no drafter and is no point of it.
        ks (`Sequence[int]`): For which to tell; what was timed is told as it was.

    Raises:
        `ValueError`: Fewer than two points.
    """
    points = {k: value for k, value in timed.items() if k > 0}
    if len(points) < 2:
        raise InputError(f"No line leads through rounds of K = {sorted(points)}. Time two different K above 0.")
    mean_k, mean = sum(points) / len(points), sum(points.values()) / len(points)
    slope = sum((k - mean_k) * (value - mean) for k, value in points.items()) / sum((k - mean_k) ** 2 for k in points)
    return {k: timed[k] if k in timed else mean + slope * (k - mean_k) for k in ks}


def schedule(chosen: Mapping[int, int]) -> list[list[int]]:
    """
    Best K by batch size as vLLM's `num_speculative_tokens_per_batch_size` takes it: `[first, last, K]` a range.

    A range ends at a batch size that was judged, and begins after the one before; vLLM keeps the last K beyond.
    """
    sizes = sorted(chosen)
    return [[first + 1, last, chosen[last]] for first, last in zip([0, *sizes], sizes, strict=False)]


def advice(told: Mapping[int, Sequence[Choice]]) -> list[dict[str, Any]]:
    """
    What a results file wants of the choices at each batch size, JSON-able: the best one and all of them.

    Args:
        told (`Mapping[int, Sequence[Choice]]`): By batch size.
    """
    return [
        {"batch_size": size, **asdict(best(some)), "choices": [asdict(one) for one in some]}
        for size, some in told.items()
    ]


def in_words(one: Mapping[str, Any]) -> str:
    """One of [`advice`] for people, its batch size left to whoever shows it."""
    if one["num_draft_tokens"] == 0:
        return "no drafter"
    return f"K = {one['num_draft_tokens']} ({one['speedup']:.2f} times plain)"


def advised(told: Sequence[Mapping[str, Any]]) -> str:
    """All of [`advice`] in one line."""
    sizes = "; ".join(f"batch {one['batch_size']}: {in_words(one)}" for one in told)
    return f"{sizes}; foreseen from rounds timed here"
