"""The tables of docs/source/scaling.md: memory from the plan, FLOPs counted on fake tensors, times from cards' data.

    python examples/benchmarks/paper.py

Nothing is measured: shapes are those of public configs, and times take a stated share of the rates NVIDIA states.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.shapes import Shapes
from draft_opd_trl.drafters import DFlashConfig
from draft_opd_trl.training.planning import GIB, MemoryPlan, plan_memory
from draft_opd_trl.training.rehearsal import Rehearsal


# config.json of Qwen/Qwen3-*: what decides sizes.
SHARED = {"vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "dtype": torch.bfloat16}
TARGETS: dict[str, PreTrainedConfig] = {
    "Qwen3-4B": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, **SHARED,
    ),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, **SHARED,
    ),
    "Qwen3-32B": Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False, **SHARED,
    ),
}  # fmt: skip
MOE = Qwen3MoeConfig(
    hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, tie_word_embeddings=False, **SHARED,
)  # fmt: skip
# Memory in GiB, dense bf16 FLOP/s with float32 accumulation, bytes/s of memory, from NVIDIA's data sheets.
CARDS = {"24 GB": (24, 165e12, 1.008e12), "80 GB": (80, 989e12, 3.35e12)}
UTILISATION = 0.4  # share of both rates that is assumed to be reached
TAU = 5.0
SMALL = {
    "per_device_train_batch_size": 1,
    "activation_checkpointing": True,
    "rollout_batch_size": 4,
    "num_anchors": 256,
    "loss_chunk_size": 256,
    "gradient_accumulation_steps": 8,
    "optim": "adamw_8bit",
}
LARGE = {
    "per_device_train_batch_size": 4,
    "activation_checkpointing": True,
    "rollout_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "optim": "adamw_torch",
}


CASES = (
    ("Qwen3-4B", "bf16", "24 GB", SMALL),
    ("Qwen3-4B", "nf4", "24 GB", SMALL),
    ("Qwen3-8B", "bf16", "24 GB", SMALL),
    ("Qwen3-8B", "nf4", "24 GB", SMALL),
    ("Qwen3-8B", "bf16", "80 GB", LARGE),
    ("Qwen3-32B", "bf16", "80 GB", SMALL),
)
PHASES = ("rollout", "replay and scoring", "training", "update")


def drafter_for(target: PreTrainedConfig) -> DFlashConfig:
    """A DFlash drafter as z-lab's: five layers as wide as the target's, blocks of 16."""
    return DFlashConfig.from_target(target, mask_token_id=target.vocab_size - 1)


def packed(config: PreTrainedConfig) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return config


class Flops(Shapes):
    """Counts floating-point operations beside the bytes."""

    total = 0

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        output = super().run(func, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=output)
        return output


def flops_of(step: Rehearsal, run: Callable[[], Any]) -> tuple[float, Any]:
    before = step.live.total
    result = run()
    return float(step.live.total - before), result


def seconds(target: PreTrainedConfig, args: DraftOPDConfig, plan: MemoryPlan, card: str) -> dict[str, float]:
    """Expected seconds of one optimizer step: of its texts, its batches and its gradients."""
    compute, bandwidth = (UTILISATION * rate for rate in CARDS[card][1:])
    options = {"acceptance_length": TAU, "live": Flops()}
    step = Rehearsal(target, drafter_for(target), args, **options)
    prepare, (batches, _) = flops_of(step, step.prepare)
    train, _ = flops_of(step, lambda: step.train(batches))
    texts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rounds = args.max_completion_length / TAU * texts / step.lanes
    # A round of decoding reads all weights, and on average half of the cache.
    cache = plan.phases["rollout"]["target's KV cache"]
    read = plan.always["target weights"] + plan.always["drafter weights"] + cache / 2
    times = {
        "rollout": rounds * read / bandwidth,
        "replay": args.gradient_accumulation_steps * prepare / compute,
        "training": args.gradient_accumulation_steps * train / compute,
    }
    return {**times, "step": sum(times.values())}


def memory_row(plan: MemoryPlan, card: str) -> list[str]:
    sizes = [*plan.always.values(), *(sum(plan.phases[phase].values()) for phase in PHASES), plan.peak]
    return [*(f"{size / GIB:.1f}" for size in sizes), "yes" if plan.peak < CARDS[card][0] * GIB else "no"]


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def main() -> None:
    memory, times = [], []
    for name, weights, card, settings in CASES:
        target = TARGETS[name] if weights == "bf16" else packed(TARGETS[name])
        args = DraftOPDConfig("unused", max_completion_length=1024, **settings)
        args.bf16 = True  # on a GPU; where there is none, the config refuses it
        plan = plan_memory(target, drafter_for(target), args, acceptance_length=TAU)
        memory.append([name, weights, card, *memory_row(plan, card)])
        times.append([name, weights, card, *(f"{value:.1f}" for value in seconds(target, args, plan, card).values())])
    case = ["target", "weights", "card"]
    print(table([*case, "target", "drafter", "optimizer", *PHASES, "peak", "fits"], memory))
    print(table([*case, "rollout", "replay", "training", "step"], times))
    with torch.device("meta"):
        mixture = sum(parameter.nbytes for parameter in AutoModelForCausalLM.from_config(MOE).parameters())
    print(f"Qwen3-235B-A22B: {mixture / GIB:.0f} GiB of weights in bf16")


if __name__ == "__main__":
    main()
