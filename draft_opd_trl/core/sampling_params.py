"""How the target's tokens are drawn: the settings alone, checked."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import settle
from .limits import LIMITS


@dataclass(frozen=True)
class SamplingParams:
    """
    How tokens are drawn from logits.

    Args:
        temperature (`float`, *optional*, defaults to `0.0`):
            0 takes the argmax.
        top_k (`int`, *optional*, defaults to `0`):
            Keep the `top_k` most likely tokens; 0 keeps all.
        top_p (`float`, *optional*, defaults to `1.0`):
            Keep the smallest set of most likely tokens whose mass reaches `top_p`, after the temperature.

    Raises:
        `ValueError` or `TypeError`: A setting is outside its range, or of the wrong type.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        settle(self, LIMITS)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
