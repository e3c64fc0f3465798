"""Say how much memory a training step will take, from configs alone.

Nothing is downloaded but two config.json files. With `--device_memory` the plan is for a GPU of that size, in bf16
where the settings do not say otherwise, and says what to turn if it does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..training.config import DraftOPDConfig
from .options import AdapterArguments, PairArguments, check_bits


@dataclass
class PlanArguments(PairArguments):
    """What to plan for."""

    device_memory: float | None = field(default=None, metadata={"help": "Memory of the GPU, in GiB."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the target to 8 bits (bitsandbytes)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the target to nf4 (bitsandbytes)."})
    acceptance_length: float = field(default=1.0, metadata={"help": "τ to assume; 1 gives the most blocks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.load_in_8bit, self.load_in_4bit)


ARGUMENTS = (PlanArguments, AdapterArguments, DraftOPDConfig)
NOT_COUNTED = (
    "Not counted: the CUDA context and kernels' workspaces, fragmentation, gradient buckets of DDP, and what FSDP or "
    "DeepSpeed shard away. Attention is taken to run fused."
)


def run(arguments: PlanArguments, adapter: AdapterArguments, config: DraftOPDConfig) -> dict[str, Any]:
    import torch
    from transformers import BitsAndBytesConfig

    from ..folders.checkpoints import load_drafter_config
    from ..folders.target_folder import HUB, read_target_config
    from ..training.planning import GIB, find_levers, plan_memory

    loading = config.teacher_model_init_kwargs or {}
    target = read_target_config(
        arguments.teacher_model_name_or_path, **{key: loading[key] for key in HUB if key in loading}
    )
    dtype = loading.get("dtype", "auto")
    if dtype != "auto":
        target.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if arguments.load_in_8bit or arguments.load_in_4bit:
        target.quantization_config = BitsAndBytesConfig(
            load_in_8bit=arguments.load_in_8bit, load_in_4bit=arguments.load_in_4bit, bnb_4bit_quant_type="nf4"
        )
    drafter = load_drafter_config(arguments.model_name_or_path)
    # As a GPU of that size would be driven.
    config.bf16 = config.bf16 or (arguments.device_memory is not None and not config.fp16)
    options = {"acceptance_length": arguments.acceptance_length, "peft_config": adapter.peft_config()}
    plan = plan_memory(target, drafter, config, **options)
    result = {**vars(plan), "fullest": plan.fullest, "peak": plan.peak}
    if arguments.device_memory is not None:
        result["device_memory"] = int(arguments.device_memory * GIB)
        if plan.peak > result["device_memory"]:
            result["levers"] = find_levers(plan, target, drafter, config, **options)
    return result


def show(result: dict[str, Any]) -> str:
    from ..core.terminal import as_text
    from ..training.planning import MemoryPlan, fit, misfit

    parts = [MemoryPlan(result["always"], result["phases"], result["limits"]).table(), "", NOT_COUNTED]
    if "levers" in result:
        parts += ["", misfit(result["peak"], result["device_memory"], result["levers"])]
    elif "device_memory" in result:
        parts += ["", fit(result["peak"], result["device_memory"])]
    return as_text(*parts)
