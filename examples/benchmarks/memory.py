"""The memory plan against the peak that PyTorch's allocator saw, over whole training steps on a CPU.

    python examples/benchmarks/memory.py

Trains random models of a few million parameters for two steps in each setting. A random drafter is nearly always
rejected, so every text has as many blocks as the plan allows for. Ends by printing one JSON line; `plan_error` is the
largest relative error.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, Target, create_drafter
from draft_opd_trl.core.shapes import tensor_bytes
from draft_opd_trl.core.terminal import as_text, table
from draft_opd_trl.training.planning import plan_memory


PROMPT_LENGTH = 32
VOCAB = 4096
DRAFTERS = {
    "dflash": {"mask_token_id": VOCAB - 1, "block_size": 8, "num_hidden_layers": 2, "target_layer_ids": [1, 2]},
    "eagle3": {"num_draft_tokens": 4, "target_layer_ids": [0, 1, 2], "draft_token_ids": list(range(VOCAB // 4))},
}
GIVEN = {"rollout_source": "dataset"}
SFT = {"lmbda": 0.0, **GIVEN}
SHORT = {"num_anchors": 4, "max_completion_length": 64}
# Name, drafter, settings. Between them, every part of the plan weighs in some.
SETTINGS = (
    ("dflash", "dflash", GIVEN),
    ("dflash, 64 anchors", "dflash", {"num_anchors": 64, **GIVEN}),
    ("dflash, 64 anchors, SFT", "dflash", {"num_anchors": 64, **SFT}),
    ("dflash, SFT, chunks of 1024 slots", "dflash", {"num_anchors": 64, "loss_chunk_size": 1024, **SFT}),
    ("dflash, recomputed", "dflash", {"activation_checkpointing": True, **GIVEN}),
    ("dflash, rejected stream", "dflash", {"rejected_weight": 1.0, "num_anchors": 64, **GIVEN}),
    ("dflash, T = 1, forward KL", "dflash", {"temperature": 1.0, "num_anchors": 64, **SFT}),
    ("dflash, 32 texts decoded", "dflash", {"gradient_accumulation_steps": 8, **SHORT}),
    ("dflash, kept states", "dflash", {"gradient_accumulation_steps": 8, "rejected_weight": 1.0, **SHORT}),
    ("dflash, 8 batches a step", "dflash", {"gradient_accumulation_steps": 8, "num_anchors": 8, **SFT}),
    ("eagle3", "eagle3", GIVEN),
    ("eagle3, 64 anchors, SFT", "eagle3", {"num_anchors": 64, **SFT}),
    ("eagle3, rejected stream", "eagle3", {"rejected_weight": 1.0, **GIVEN}),
    ("eagle3, short texts", "eagle3", {"num_anchors": 8, "max_completion_length": 32, **SFT}),
)


def small_target() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[config.eos_token_id] = 0  # never the likeliest, so no text ends early
    return model


def small_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def allocated_peak(run: Any) -> int:
    """Most bytes that PyTorch's CPU allocator held at once for what `run()` allocated."""
    gc.collect()  # the profiler would count what an earlier run left behind as freed by this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compare(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Planned and measured peak of two training steps, in bytes."""
    target = small_target()
    drafter = create_drafter(kind, Target(target), init_from_target=False, **DRAFTERS[kind])
    options = {"per_device_train_batch_size": 4, "max_completion_length": 256, **settings}
    with tempfile.TemporaryDirectory() as folder:
        args = DraftOPDConfig(folder, max_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, **options)
        count = 2 * args.per_device_train_batch_size * args.steps_per_generation
        draws = torch.Generator().manual_seed(0)
        texts = torch.randint(2, VOCAB, (count, PROMPT_LENGTH + args.max_completion_length), generator=draws)
        columns = {
            "prompt_ids": texts[:, :PROMPT_LENGTH].tolist(),
            "completion_ids": texts[:, PROMPT_LENGTH:].tolist(),
        }
        trainer = DraftOPDTrainer(
            drafter, target, args, Dataset.from_dict(columns), processing_class=small_tokenizer()
        )
        clock = time.perf_counter()
        plan = plan_memory(target.config, drafter.config, args, prompt_length=PROMPT_LENGTH)
        seconds = time.perf_counter() - clock
        weights = tensor_bytes([tensor for m in (target, drafter) for tensor in (*m.parameters(), *m.buffers())])
        trainer._before_training = lambda: None  # the plan that a run prints is not part of it
        measured = weights + allocated_peak(trainer.train)
    return {"planned": plan.peak, "measured": measured, "fullest": plan.fullest, "seconds_to_plan": seconds}


def main() -> None:
    logging.set_verbosity_error()
    results, lines = {}, []
    for name, kind, settings in tqdm(SETTINGS):
        result = compare(kind, settings)
        result["error"] = result["planned"] / result["measured"] - 1
        results[name] = result
        sizes = [f"{result[key] / 2**20:.1f}" for key in ("planned", "measured")]
        lines.append([f"{name}: {result['fullest']}", *sizes, f"{result['error']:.1%}"])
    print(as_text(table(["setting: fullest phase", "planned, MiB", "measured, MiB", "error"], lines, numbers=True)))
    error = max(abs(result["error"]) for result in results.values())
    print(json.dumps({"plan_error": error, "settings": results}))


if __name__ == "__main__":
    main()
