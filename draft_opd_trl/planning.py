"""What a training step will hold in memory, before anything is loaded, and what to turn when it does not fit.

Adds up what a [`Rehearsal`] of the step finds. Knows no architectures, no texts and no clock.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedConfig

from .config import DraftOPDConfig
from .rehearsal import Rehearsal


GIB = 2**30


@dataclass
class MemoryPlan:
    """
    The memory of a training step in bytes.

    Args:
        always (`dict[str, int]`): What stays for the whole run, by part.
        phases (`dict[str, dict[str, int]]`): What each phase of a step holds beside it at its fullest, by part.
        limits (`dict[str, int]`): The shapes planned for: texts, positions, blocks.
    """

    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    limits: dict[str, int]

    @property
    def fullest(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + sum(self.phases[self.fullest].values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "always": self.always,
            "phases": self.phases,
            "limits": self.limits,
            "fullest": self.fullest,
            "peak": self.peak,
        }

    def table(self) -> str:
        """The plan as aligned lines, sizes in GiB."""
        rows = [("the whole run", None, sum(self.always.values()))]
        rows += [("", part, size) for part, size in self.always.items()]
        for phase, parts in self.phases.items():
            rows.append((phase + (" (fullest)" if phase == self.fullest else ""), None, sum(parts.values())))
            rows += [("", part, size) for part, size in parts.items()]
        rows.append(("peak: the whole run + the fullest phase", None, self.peak))
        lines = [
            f"{name:<52}{size / GIB:>9.3f} GiB" if part is None else f"    {part:<36}{size / GIB:>9.3f}"
            for name, part, size in rows
        ]
        shapes = ", ".join(f"{count} {name}" for name, count in self.limits.items())
        return "\n".join([f"Memory of a step with at most {shapes}:", *lines, NOT_COUNTED])


NOT_COUNTED = (
    "Not counted: the CUDA context and kernels' workspaces, fragmentation, gradient buckets of DDP, and what FSDP or "
    "DeepSpeed shard away. Attention is taken to run fused."
)


def plan_memory(
    target_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    args: DraftOPDConfig,
    prompt_length: int | None = None,
    **options: Any,
) -> MemoryPlan:
    """
    What a training step will hold in memory on one process, before anything is loaded.

    Args:
        target_config, drafter_config ([`~transformers.PreTrainedConfig`]): As in [`Rehearsal`].
        args ([`DraftOPDConfig`]): Settings.
        prompt_length (`int`, *optional*): Longest prompt in tokens; `args.max_prompt_length` by default.
        options: Further arguments of [`Rehearsal`].

    Returns:
        [`MemoryPlan`].

    Raises:
        `ValueError`: No prompt length is known, or the target's quantisation is not.
    """
    prompt_length = args.max_prompt_length if prompt_length is None else prompt_length
    if prompt_length is None:
        raise ValueError("max_prompt_length is unset, so nothing bounds a step's memory. Set it to plan.")
    with FakeTensorMode():
        step = Rehearsal(target_config, drafter_config, args, prompt_length, **options)
        phases = {}
        if args.rollout_source in ("speculation", "generate") or args.eval_strategy != "no":
            phases["rollout"] = step.rollout()
        batch, phases["replay and scoring"] = step.prepare()
        phases["training"] = step.train(batch)
        optimizer_state, phases["update"] = step.update(batch)
        always = {**step.weights(), "optimizer state": optimizer_state}
    limits = {
        "texts": step.rows,
        "positions a text": step.length,
        "blocks a text": step.blocks_per_row,
        "texts decoded side by side": step.slots,
    }
    return MemoryPlan(always, phases, limits)
