"""What a training step will hold in memory, before anything is loaded, and what to turn when it does not fit.

Adds up what a [`Rehearsal`] of the step finds. Knows no architectures, no texts and no clock.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging

from ..core.errors import InputError
from .config import DraftOPDConfig
from .rehearsal import Rehearsal


logger = logging.get_logger(__name__)

GIB = 2**30
NOT_COUNTED = (
    "Not counted: the CUDA context and kernels' workspaces, fragmentation, gradient buckets of DDP, and what FSDP or "
    "DeepSpeed shard away. Attention is taken to run fused."
)
# Settings that bound memory; the plan is made anew with each of them halved.
HALVED = (
    "num_anchors",
    "loss_chunk_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "rollout_batch_size",
)


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

    def line(self) -> str:
        """The plan in one line."""
        phases = ", ".join(f"{phase} {sum(parts.values()) / GIB:.3g}" for phase, parts in self.phases.items())
        return (
            f"memory plan (GiB): {self.peak / GIB:.3g} at most = {sum(self.always.values()) / GIB:.3g} for the whole "
            f"run + the fullest of: {phases}"
        )

    def table(self) -> str:
        """The plan as aligned lines, sizes in GiB."""
        lines = ["Memory of a step with at most " + ", ".join(f"{n} {name}" for name, n in self.limits.items())]
        for phase, parts in {"whole run": self.always, **self.phases}.items():
            mark = " (fullest)" if phase == self.fullest else ""
            lines.append(f"{phase + mark:<44}{sum(parts.values()) / GIB:>9.3f} GiB")
            lines += [f"    {part:<40}{size / GIB:>9.3f}" for part, size in parts.items()]
        lines.append(f"{'peak: whole run + fullest phase':<44}{self.peak / GIB:>9.3f} GiB")
        return "\n".join([*lines, NOT_COUNTED])


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
        raise InputError("max_prompt_length is unset, so nothing bounds a step's memory. Set it to plan.")
    step = Rehearsal(target_config, drafter_config, args, prompt_length, **options)
    phases = {}
    if args.rollout_source in ("speculation", "generate") or args.eval_strategy != "no":
        phases["rollout"] = step.rollout()
    batches, phases["replay and scoring"] = step.prepare()
    phases["training"] = step.train(batches)
    optimizer_state, phases["update"] = step.update(batches)
    always = {**step.weights(), "optimizer state": optimizer_state}
    texts = len(batches[0].tokens)
    limits = {
        "texts": texts,
        "positions a text": step.length,
        "blocks a text": max(math.ceil(len(batch.blocks) / texts) for batch in batches),
        "texts decoded side by side": step.lanes,
    }
    return MemoryPlan(always, phases, limits)


def find_levers(
    target_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    args: DraftOPDConfig,
    prompt_length: int | None = None,
    **options: Any,
) -> dict[str, int]:
    """
    What to turn when a step does not fit: the bytes that the peak falls by when one setting alone changes.

    Args:
        target_config, drafter_config, args, prompt_length, options: As in [`plan_memory`].

    Returns:
        `dict[str, int]`: The change, as `name=value`, and the bytes it frees, the most first; only what frees any.
    """
    trials: dict[str, tuple[PreTrainedConfig, DraftOPDConfig]] = {}
    plan = plan_memory(target_config, drafter_config, args, prompt_length, **options)
    # Settings that ask for more than there is are halved from what there is.
    there = {"num_anchors": "blocks a text", "rollout_batch_size": "texts decoded side by side"}
    for name in HALVED:
        value = (plan.limits[there[name]] if name in there else getattr(args, name)) // 2
        if value:
            trials[f"{name}={value}"] = (target_config, _turned(args, name, value))
    if not args.activation_checkpointing:
        trials["activation_checkpointing=True"] = (target_config, _turned(args, "activation_checkpointing", True))
    if "8bit" not in args.optim:
        trials["optim=adamw_8bit"] = (target_config, _turned(args, "optim", "adamw_8bit"))
    if getattr(target_config, "quantization_config", None) is None:
        packed = copy.deepcopy(target_config)
        packed.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        trials["target in nf4"] = (packed, args)
    freed = {
        name: plan.peak - plan_memory(config, drafter_config, turned, prompt_length, **options).peak
        for name, (config, turned) in trials.items()
    }
    return dict(sorted(((name, size) for name, size in freed.items() if size > 0), key=lambda item: -item[1]))


def _turned(args: DraftOPDConfig, name: str, value: Any) -> DraftOPDConfig:
    turned = copy.copy(args)
    setattr(turned, name, value)
    if name == "gradient_accumulation_steps" and args.steps_per_generation == args.gradient_accumulation_steps:
        turned.steps_per_generation = value
    return turned


def misfit(peak: int, memory: int, levers: dict[str, int]) -> str:
    """What to say where a device has `memory` bytes, fewer than `peak`; `levers` as from [`find_levers`]."""
    turns = "; ".join(f"{name} frees {size / GIB:.3g}" for name, size in levers.items())
    return (
        f"The plan's {peak / GIB:.3g} GiB exceed the device's {memory / GIB:.3g} GiB. What to turn, each alone, in "
        f"GiB: {turns}."
    )


def announce_plan(
    target_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    args: DraftOPDConfig,
    prompt_length: int,
    device: torch.device,
    **options: Any,
) -> None:
    """Print the plan in a line, with a warning where it exceeds the memory of a CUDA `device`."""
    try:
        plan = plan_memory(target_config, drafter_config, args, prompt_length, **options)
    except Exception as error:
        # Others' models and optimizers may do what cannot be rehearsed; that is no reason not to train.
        print(f"no memory plan for this model: {error}")
        return
    print(plan.line())
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if plan.peak > memory:
            levers = find_levers(target_config, drafter_config, args, prompt_length, **options)
            logger.warning(misfit(plan.peak, memory, levers))
