"""The quickstart: one drafter, one set of texts, trained on by SFT and by Draft-OPD, judged by real decoding.

    accelerate launch examples/quickstart.py
    accelerate launch examples/quickstart.py --temperature 1
    accelerate launch examples/quickstart.py --drafter eagle3 --max_steps 50 --seed 1

Fair by construction: both start from the shipped drafter (an SFT plateau), see the same texts in the same order, train
on at most the same number of blocks a text, and use the same optimizer, each at the best of the same four rates in the
study of recipes (on other prompts). SFT is shown at equal steps and at equal wall time.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pocket import POCKET, read_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from draft_opd_trl import (
    DraftOPDConfig,
    DraftOPDTrainer,
    SamplingParams,
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import write_atomically
from draft_opd_trl.decoding.acceptance import AcceptanceReport, difference
from draft_opd_trl.drafters.base import Drafter
from draft_opd_trl.evaluation.measure import changed_texts, text_seeds
from draft_opd_trl.evaluation.report import plot_acceptance


LABELS = {
    "start": "start (SFT plateau)",
    "sft": "SFT continued, equal steps",
    "sft-equal-time": "SFT continued, equal time",
    "opd": "Draft-OPD",
}


# The best of 1e-3, 2e-3, 4e-3 and 8e-3 for the narrow drafter, on greedy text and on drawn text (docs: benchmarks).
RATES = {True: {"sft": 2e-3, "opd": 4e-3}, False: {"sft": 1e-3, "opd": 4e-3}}


@dataclass
class QuickstartArguments:
    """Settings that all arms share."""

    drafter: str = field(default="dflash-narrow", metadata={"help": "Shipped drafter to start from."})
    temperature: float = field(default=0.0, metadata={"help": "At which the target writes and verifies."})
    output_dir: str | None = field(default=None, metadata={"help": "By default outputs/quickstart[-<drafter>][-t…]."})
    seed: int = field(default=42, metadata={"help": "Of all that is drawn."})
    max_steps: int = field(default=500, metadata={"help": "Steps of Draft-OPD, and of SFT at equal steps."})
    batch_size: int = field(default=4, metadata={"help": "Texts a step."})
    num_anchors: int = field(default=32, metadata={"help": "Most blocks trained on, a text."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of all arms; by default each its best."})
    texts: int = field(default=1600, metadata={"help": "Most texts to train on."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest text, in tokens."})
    eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts to judge on."})
    watched_prompts: int = field(default=32, metadata={"help": "Of these, measured during training too."})


def shipped_drafter(kind: str) -> str:
    folder = POCKET / f"drafter-{kind}"
    if not (folder / "config.json").is_file():
        raise SystemExit(f"There is no {folder}. Build it with `examples/pocket/build.py drafter --drafter {kind}`.")
    return str(folder)


def train_arm(
    args: QuickstartArguments, origin: str, folder: Path, lmbda: float, steps: int, **shared: Any
) -> tuple[DraftOPDTrainer, float]:
    """Train by SFT (`lmbda` 0) or Draft-OPD (1) on what all arms share; the seconds are those of training alone."""
    config = DraftOPDConfig(
        output_dir=str(folder),
        lmbda=lmbda,
        max_steps=steps,
        learning_rate=args.learning_rate or RATES[args.temperature == 0]["opd" if lmbda else "sft"],
        temperature=args.temperature,
        seed=args.seed,
        rollout_source="dataset",
        per_device_train_batch_size=args.batch_size,
        num_anchors=args.num_anchors,
        max_completion_length=args.max_new_tokens,
        save_strategy="no",
        logging_steps=max(steps // 3, 1),
        eval_strategy="steps",
        eval_on_start=True,
        report_to="none",
        disable_tqdm=False,  # quiet logging, set below, would turn the bar off too
    )
    trainer = DraftOPDTrainer(load_drafter(origin), args=config, **shared)
    began = time.perf_counter()
    trainer.train()
    measuring = sum(log.get("eval_runtime", 0) for log in trainer.state.log_history)
    seconds = time.perf_counter() - began - measuring
    trainer.save_model()
    return trainer, seconds


def main(args: QuickstartArguments) -> dict[str, Any]:
    """Train all arms, judge them on the same held-out prompts, and write what `results.json` holds."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    origin = shipped_drafter(args.drafter)
    named = "quickstart" if args.drafter == "dflash-narrow" else f"quickstart-{args.drafter}"
    named += f"-t{args.temperature:g}" if args.temperature else ""
    output = Path(args.output_dir or f"outputs/{named}")
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    # The target writes the texts to train on: once, sped up by the drafter.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32).to(device)
    target = Target(model)
    drafter = load_drafter(origin).to(device).bind(target)
    stops, sampling = stop_token_ids(model, tokenizer), SamplingParams(args.temperature)
    settings = SpeculationSettings(args.max_new_tokens, stops, sampling, batch_size=64)
    prompts = read_prompts(tokenizer, "quickstart.jsonl", min(args.max_steps * args.batch_size, args.texts))
    held_out = read_prompts(tokenizer, "heldout.jsonl", args.eval_prompts)
    print(f"The target writes {len(prompts)} texts to train on …")
    seeds = text_seeds(args.seed, range(len(prompts)))
    texts = speculate(target, drafter, prompts, settings, seeds=seeds).completions()
    shared = {
        "teacher_model": model,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_dict({"prompt_ids": prompts, "completion_ids": texts}),
        "eval_dataset": Dataset.from_dict({"prompt_ids": held_out[: args.watched_prompts]}),
    }
    seconds = {"texts": time.perf_counter() - started}

    # Plain decoding and the start, on prompts that no drafter has seen. Every decoding draws the same numbers.
    def judge(drafter: Drafter | None, label: str) -> AcceptanceReport:
        seeds = text_seeds(0, range(len(held_out)))
        return measure_acceptance(target, drafter, held_out, settings, progress=label, seeds=seeds)

    plain = judge(None, "Decoding without a drafter") if sampling.greedy else None
    reports = {"start": judge(drafter, "Judging the start")}

    # The arms. Equal time is as many SFT steps as fit the time Draft-OPD took, with a schedule of their own.
    steps: dict[str, int] = {}
    logs: dict[str, list[dict]] = {}
    for name, lmbda in (("opd", 1.0), ("sft", 0.0), ("sft-equal-time", 0.0)):
        equal_time = name == "sft-equal-time"
        steps[name] = max(round(args.max_steps * seconds["opd"] / seconds["sft"]), 1) if equal_time else args.max_steps
        print(f"Training {name}: {steps[name]} steps …")
        folder = output / f"drafter-{name}"
        trainer, seconds[name] = train_arm(args, origin, folder, lmbda, steps[name], **shared)
        logs[name] = trainer.state.log_history
        reports[name] = judge(trainer.drafter, f"Judging {name}")

    # What came of it, as numbers, a table and pictures.
    changed = {
        name: plain and changed_texts(target, held_out, plain, report)["changed"] for name, report in reports.items()
    }
    seconds["total"] = time.perf_counter() - started
    results = {
        "tau_start": reports["start"].acceptance_length,
        "tau_sft": reports["sft"].acceptance_length,
        "tau_sft_equal_time": reports["sft-equal-time"].acceptance_length,
        "tau_opd": reports["opd"].acceptance_length,
        "opd_minus_sft": difference(reports["opd"], reports["sft"]),
        "opd_minus_sft_equal_time": difference(reports["opd"], reports["sft-equal-time"]),
        "prompts": len(held_out),
        "seed": args.seed,
        "steps": steps,
        "seconds": seconds,
        "temperature": args.temperature,
        "texts_changed": changed,
        "drafters": {name: report.summary() for name, report in reports.items()},
    }
    write_atomically(output / "results.json", json.dumps(results, indent=2))
    write_atomically(output / "results.md", table(results))
    reports = {LABELS[name]: report for name, report in reports.items()}
    plot_acceptance(reports, output / "tau.png", {LABELS[name]: log for name, log in logs.items()})
    print(f"\n{table(results)}\n\nWritten to {output}: results.json, results.md, tau.png and the trained drafters")
    return results


def table(results: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    slots = len(results["drafters"]["start"]["acceptance_by_slot"])
    head = ["drafter", "τ", "steps", "training s", "texts changed"]
    rows = [[*head, *(f"≥ {k}" for k in range(1, slots + 1))], ["---"] * (len(head) + slots)]
    for name, label in LABELS.items():
        drafter = results["drafters"][name]
        trained = name in results["steps"]
        rows.append(
            [
                label,
                f"{drafter['acceptance_length']:.3f}",
                str(results["steps"][name]) if trained else "–",
                f"{results['seconds'][name]:.0f}" if trained else "–",
                "–" if results["temperature"] else f"{results['texts_changed'][name]} of {results['prompts']}",
                *(f"{share:.0%}" for share in drafter["acceptance_by_slot"]),
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for key, label in (("opd_minus_sft", "equal steps"), ("opd_minus_sft_equal_time", "equal wall time")):
        change = results[key]
        share = change["mean"] / (results["tau_opd"] - change["mean"])
        lines.append(
            f"\nDraft-OPD − SFT continued at {label}: **{change['mean']:+.3f} τ** "
            f"[{change['low']:+.3f}, {change['high']:+.3f}], {share:+.1%} "
            f"(paired 95 % bootstrap over {results['prompts']} prompts)"
        )
    lines.append(
        f"\nτ: tokens committed per verification at temperature {results['temperature']:g}, recovered or bonus token "
        "counted. ≥ k: share of blocks whose first k proposals were all accepted."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(QuickstartArguments).parse_args_into_dataclasses())
