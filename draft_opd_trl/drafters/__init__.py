"""The registry of drafter architectures. A new one is a file here and a line in `DRAFTERS`."""

from __future__ import annotations

from typing import Any

from ..core.errors import InputError
from ..core.target import Target
from ..core.travel import travelling_code
from .base import Drafter, Proposal
from .causal_lm import CausalLMDrafter
from .dflash import DFlashDraftModel
from .dflash_config import DFlashConfig
from .drafter_config import DrafterConfig
from .dspark import Qwen3DSparkModel
from .eagle3 import LlamaForCausalLMEagle3


DRAFTERS: dict[str, type[Drafter]] = {
    "dflash": DFlashDraftModel,
    "eagle3": LlamaForCausalLMEagle3,
    "dspark": Qwen3DSparkModel,
    "causal_lm": CausalLMDrafter,
}
Drafter.travelling_code = staticmethod(travelling_code)


def create_drafter(
    kind: str, target: Target, init_from_target: bool = True, from_drafter: Drafter | None = None, **config: Any
) -> Drafter:
    """
    A new, untrained drafter shaped after `target`, bound to it.

    Args:
        kind (`str`): Key in `DRAFTERS`.
        target ([`Target`]): What it will draft for.
        init_from_target (`bool`, *optional*, defaults to `True`): Copy the target's last layers where shapes fit.
        from_drafter ([`Drafter`], *optional*): Start where this one of another kind stands, and not from the target.
        config: Passed to the architecture's `from_target` (block size, mask token, layers …), or `from_drafter`.

    Raises:
        `TypeError`: An option that the architecture does not have.
        `ValueError`: Unknown kind, the config does not fit the target, or kinds that share nothing to start from.
    """
    if kind not in DRAFTERS:
        raise InputError(f"Unknown drafter kind {kind!r}; known kinds are {sorted(DRAFTERS)}.")
    drafter_class = DRAFTERS[kind]
    if from_drafter is not None:
        return drafter_class.from_drafter(from_drafter, **config).to(target.device).bind(target)
    return drafter_class.made_for(target, init_from_target, **config)


__all__ = ["DRAFTERS", "DFlashConfig", "DFlashDraftModel", "Drafter", "DrafterConfig", "Proposal", "create_drafter"]
