"""
What a training step costs: its parts, the share of the device's rate that its arithmetic reaches, its memory against
the plan, and how it grows.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from memory import small_tokenizer
from paper import Flops, flops_of
from step import ARMS, Arm
from transformers import PreTrainedConfig

from draft_opd_trl import DraftOPDConfig, Target
from draft_opd_trl.training.planning import GIB, plan_memory
from draft_opd_trl.training.rehearsal import Rehearsal

from .planted import Size, planted_drafter, planted_target, planted_texts


# Dense bf16 FLOP/s with float32 accumulation, from the makers' data sheets; the first whose name is part of the
# device's. Of others no utilisation is told.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}


def peak_rate(device_name: str) -> float | None:
    """FLOP/s that the device could do, if it is known."""
    return next((rate for name, rate in PEAKS.items() if name in device_name), None)


def model_flops(
    target: PreTrainedConfig, drafter: PreTrainedConfig, args: DraftOPDConfig, prompt_length: int
) -> float:
    """
    Of one micro-step of SFT over texts of full length: the matrix products that its mathematics needs, so nothing that
    is computed twice (but what EAGLE-3 always does beyond 64 blocks a text). Attention's are left out.
    """
    args = copy.copy(args)
    args.loss_chunk_size, args.activation_checkpointing = 2**62, False
    step = Rehearsal(target, drafter, args, prompt_length, live=Flops())
    prepare, (batches, _) = flops_of(step, step.prepare)
    train, _ = flops_of(step, lambda: step.train(batches))
    return prepare + train


def settings(size: Size, folder: str, **options: Any) -> DraftOPDConfig:
    """What all arms share, and what an arm has of its own."""
    shared = {
        "per_device_train_batch_size": size.texts,
        "num_anchors": size.blocks,
        "max_completion_length": size.completion_length,
        "rollout_batch_size": size.texts,
        "num_texts_to_check": 0,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return DraftOPDConfig(folder, **{**shared, **options})


def measure_arm(
    size: Size, target: Target, kind: str, options: dict[str, Any], with_plan: bool = True
) -> dict[str, Any]:
    """One way of training, after a step to warm up; what needs a GPU to be told is `None` without one."""
    device = target.device
    on_cuda = device.type == "cuda"
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(size, folder, **options)
        drafter = planted_drafter(size, kind, target)
        texts = planted_texts(size, 2 * args.per_device_train_batch_size, args.max_completion_length)
        arm = Arm(args, drafter, target.model, small_tokenizer(), texts)
        arm.step()
        arm.forget()
        seconds = sum(arm.step() for _ in range(size.steps)) / size.steps
        found = {"ms": 1e3 * seconds, "parts": arm.parts(size.steps), "blocks": sum(arm.blocks) / size.steps}
        if args.lmbda > 0:
            found["tau"] = arm.trainer.last_acceptance_length
        if not with_plan:
            return found
        shapes = (target.config, drafter.config, args)
        peak = torch.cuda.max_memory_allocated() if on_cuda else None
        plan = plan_memory(*shapes, prompt_length=size.prompt_length).peak
        found |= {"plan_gib": plan / GIB, "peak_gib": peak and peak / GIB, "plan_over_peak": peak and plan / peak}
        if args.lmbda == 0:
            rate = peak_rate(torch.cuda.get_device_name()) if on_cuda else None
            flops = model_flops(*shapes, size.prompt_length)
            found |= {"tflops": flops / 1e12, "mfu": rate and flops / seconds / rate}
    return found


def measure_steps(size: Size, device: torch.device, name: str, kind: str) -> Iterator[tuple[str, Any]]:
    """Every arm of `step.py`."""
    target = planted_target(size.targets[name], device)
    for arm, options in ARMS.items():
        yield arm, measure_arm(size, target, kind, options)


def measure_growth(size: Size, device: torch.device) -> Iterator[tuple[str, Any]]:
    """A step of Draft-OPD by replay, as one setting after the other grows."""
    target = planted_target(next(iter(size.targets.values())), device)
    for setting, values in size.grown.items():
        for value in values:
            options = {**ARMS["Draft-OPD by replay"], setting: value}
            yield f"{setting}={value}", measure_arm(size, target, "dflash", options, with_plan=False)
