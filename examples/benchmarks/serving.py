"""τ of the shipped drafters, measured three ways on the same prompts: trainer, saved and loaded, transformers.

    python examples/benchmarks/serving.py --prompts 64

Greedy, float32. At temperature 0 the numbers of a line are equal, verification for verification. What SGLang and vLLM
make of the same folders is printed by `make test-serving`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    DRAFTERS,
    DraftOPDConfig,
    DraftOPDTrainer,
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)


def generated(model, drafter, prompts: list[list[int]], max_new_tokens: int, stops: list[int]):
    """τ and texts of transformers' own DFlash decoding; it counts nothing, so the drafter's calls are counted."""
    calls = 0

    def count(*unused) -> None:
        nonlocal calls
        calls += 1

    hook = drafter.register_forward_pre_hook(count)
    texts = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            assistant_model=drafter,
            speculation_type="dflash",
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=stops,
        )
        texts.append(output[0, len(prompt) :].tolist())
    hook.remove()
    return (sum(map(len, texts)) - len(texts)) / calls, texts


def measure(kind: str, prompts: list[list[int]], max_new_tokens: int) -> dict[str, float | int | None]:
    folder = str(POCKET / f"drafter-{kind}")
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    stops = stop_token_ids(model, tokenizer)
    dataset = Dataset.from_dict({"prompt_ids": prompts})
    with tempfile.TemporaryDirectory() as saved:
        args = DraftOPDConfig(
            output_dir=saved,
            bf16=False,
            per_device_train_batch_size=1,
            max_completion_length=max_new_tokens,
            max_steps=1,
            report_to="none",
        )
        trainer = DraftOPDTrainer(folder, model, args, dataset, dataset, processing_class=tokenizer)
        training = trainer.evaluate()["eval_acceptance_length"]
        trainer.save_model()
        drafter, target = load_drafter(saved), Target(model)
        drafter.bind(target)
        settings = SpeculationSettings(max_new_tokens, stops)
        reloaded = measure_acceptance(target, drafter, prompts, settings).acceptance_length
        row = {"training": training, "reloaded": reloaded, "generate": None, "texts changed": None}
        if kind == "dflash":
            plain = speculate(target, None, prompts, settings).completions()
            row["generate"], texts = generated(model, drafter, prompts, max_new_tokens, stops)
            row["texts changed"] = sum(text != own for text, own in zip(texts, plain, strict=True))
    return row


def main(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    prompts = read_prompts(tokenizer, "heldout.jsonl", args.prompts)
    rows = {kind: measure(kind, prompts, args.max_new_tokens) for kind in DRAFTERS}
    print("| drafter | τ, trainer's evaluation | τ, saved and loaded | τ, transformers' generate | texts changed |")
    print("|---|---|---|---|---|")
    for kind, row in rows.items():
        print(f"| {kind} | " + " | ".join("—" if value is None else f"{value:.6g}" for value in row.values()) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    main(parser.parse_args())
