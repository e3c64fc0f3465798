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
from .eagle3 import LlamaForCausalLMEagle3


DRAFTERS: dict[str, type[Drafter]] = {
    "dflash": DFlashDraftModel,
    "eagle3": LlamaForCausalLMEagle3,
    "causal_lm": CausalLMDrafter,
}
Drafter.travelling_code = staticmethod(travelling_code)


def create_drafter(kind: str, target: Target, init_from_target: bool = True, **config: Any) -> Drafter:
    """
    A new, untrained drafter shaped after `target`, bound to it.

    Args:
        kind (`str`): Key in `DRAFTERS`.
        target ([`Target`]): What it will draft for.
        init_from_target (`bool`, *optional*, defaults to `True`): Copy the target's last layers where shapes fit.
        config: Options of the kind (block size, mask token, layers …), see its config's `from_target`.

    Raises:
        `TypeError`: An option that the architecture does not have.
        `ValueError`: Unknown kind, or the config does not fit the target.
    """
    if kind not in DRAFTERS:
        raise InputError(f"Unknown drafter kind {kind!r}; known kinds are {sorted(DRAFTERS)}.")
    return DRAFTERS[kind].made_for(target, init_from_target, **config)


__all__ = ["DRAFTERS", "DFlashConfig", "DFlashDraftModel", "Drafter", "DrafterConfig", "Proposal", "create_drafter"]
