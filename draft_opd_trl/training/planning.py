"""What a training step will hold in memory, before anything is loaded, and what to turn when it does not fit.

Adds up what a [`Rehearsal`] of the step finds. Knows no architectures, no texts and no clock.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging

from ..core.terminal import table
from .config import DraftOPDConfig
from .rehearsal import Rehearsal


logger = logging.get_logger(__name__)

GIB = 2**30
# Settings that bound memory, and those that trade it for something; a plan is made anew with each halved or switched.
HALVED = (
    "num_anchors",
    "loss_chunk_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "rollout_batch_size",
)
SWITCHED = {"activation_checkpointing": True, "optim": "adamw_8bit"}


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
    def totals(self) -> dict[str, int]:
        """Bytes of the whole run and of each phase."""
        return {name: sum(parts.values()) for name, parts in {"whole run": self.always, **self.phases}.items()}

    @property
    def fullest(self) -> str:
        """The phase that decides the peak."""
        return max(self.phases, key=self.totals.get)

    @property
    def peak(self) -> int:
        return self.totals["whole run"] + self.totals[self.fullest]

    def line(self) -> str:
        """The plan in one line."""
        whole_run, *phases = [f"{name} {_gib(size)}" for name, size in self.totals.items()]
        return f"memory plan (GiB): {_gib(self.peak)} at most = {whole_run} + the fullest of: {', '.join(phases)}"

    def table(self) -> Table:
        """The plan part by part, as a terminal shows it."""
        lines = []
        for name, parts in {"whole run": self.always, **self.phases}.items():
            mark = " (fullest)" if name == self.fullest else ""
            lines.append((name + mark, f"{self.totals[name] / GIB:.3f}"))
            lines += [(f"    {part}", f"{size / GIB:.3f}") for part, size in parts.items()]
        lines.append(("peak: whole run + fullest phase", f"{self.peak / GIB:.3f}"))
        head = "Memory of a step with at most " + ", ".join(f"{count} {name}" for name, count in self.limits.items())
        return table([head, "GiB"], lines, numbers=True)


def _gib(size: int) -> str:
    return f"{size / GIB:.3g}"


def plan_memory(
    target_config: PreTrainedConfig, drafter_config: PreTrainedConfig, args: DraftOPDConfig, **options: Any
) -> MemoryPlan:
    """
    What a training step will hold in memory on one process, before anything is loaded.

    Args:
        target_config, drafter_config, args, options: As in [`Rehearsal`].
    """
    step = Rehearsal(target_config, drafter_config, args, **options)
    phases = {}
    if args.rollout_source in ("speculation", "generate") or args.eval_strategy != "no":
        phases["rollout"] = step.rollout()
    batches, phases["replay and scoring"] = step.prepare()
    phases["training"] = step.train(batches)
    optimizer_state, phases["update"] = step.update(batches)
    texts = len(batches[0].tokens)
    limits = {
        "texts": texts,
        "positions a text": step.length,
        "blocks a text": max(math.ceil(len(batch.blocks) / texts) for batch in batches),
        "texts decoded side by side": step.lanes,
    }
    return MemoryPlan({**step.weights(), "optimizer state": optimizer_state}, phases, limits)


def find_levers(
    plan: MemoryPlan,
    target_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    args: DraftOPDConfig,
    **options: Any,
) -> dict[str, int]:
    """
    What to turn when a step does not fit: the bytes that the peak falls by when one setting alone changes.

    Args:
        plan ([`MemoryPlan`]): Of the rest.
        target_config, drafter_config, args, options: As in [`Rehearsal`].

    Returns:
        `dict[str, int]`: The change, as `name=value`, and the bytes it frees, the most first; only what frees any.
    """
    # Settings that ask for more than there is are halved from what there is.
    there = {"num_anchors": "blocks a text", "rollout_batch_size": "texts decoded side by side"}
    changes = {name: (plan.limits[there[name]] if name in there else getattr(args, name)) // 2 for name in HALVED}
    changes |= SWITCHED
    trials = {
        f"{name}={value}": (target_config, _turned(args, name, value)) for name, value in changes.items() if value
    }
    packed = copy.deepcopy(target_config)
    packed.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    trials["target in nf4"] = (packed, args)
    freed = {
        name: plan.peak - plan_memory(config, drafter_config, turned, **options).peak
        for name, (config, turned) in trials.items()
    }
    return {name: freed[name] for name in sorted(freed, key=freed.get, reverse=True) if freed[name] > 0}


def _turned(args: DraftOPDConfig, name: str, value: Any) -> DraftOPDConfig:
    turned = copy.copy(args)
    setattr(turned, name, value)
    if name == "gradient_accumulation_steps" and args.steps_per_generation == args.gradient_accumulation_steps:
        turned.steps_per_generation = value
    return turned


def fit(peak: int, memory: int) -> str:
    """What to say where a device has `memory` bytes, and not fewer than `peak`."""
    return f"It fits: the plan's {_gib(peak)} GiB leave {_gib(memory - peak)} of the device's {_gib(memory)} GiB."


def misfit(peak: int, memory: int, levers: dict[str, int]) -> str:
    """What to say where a device has `memory` bytes, fewer than `peak`; `levers` as from [`find_levers`]."""
    turns = "; ".join(f"{name} frees {_gib(size)}" for name, size in levers.items())
    told = f"It does not fit: the plan's {_gib(peak)} GiB exceed the device's {_gib(memory)} GiB."
    return f"{told} What to turn, each alone, in GiB: {turns}."


def announce_plan(
    target_config: PreTrainedConfig,
    drafter_config: PreTrainedConfig,
    args: DraftOPDConfig,
    device: torch.device,
    **options: Any,
) -> None:
    """Print the plan in a line, with a warning where it exceeds the memory of a CUDA `device`."""
    models = (target_config, drafter_config, args)
    try:
        plan = plan_memory(*models, **options)
    except Exception as error:
        # Others' models and optimizers may do what cannot be rehearsed; that is no reason not to train.
        print(f"no memory plan for this model: {error}")
        return
    print(plan.line())
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        if plan.peak > memory:
            logger.warning(misfit(plan.peak, memory, find_levers(plan, *models, **options)))
