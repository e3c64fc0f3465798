"""The quickstart: one drafter, one set of texts, trained on by SFT and by Draft-OPD, judged by real decoding.

Fair by construction: both start from the shipped drafter (an SFT plateau), see the same texts in the same order, train
on at most the same number of blocks a text, and use the same optimizer and learning rate. SFT is shown at equal steps
and at equal wall time.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from draft_opd_trl import (
    DraftOPDConfig,
    DraftOPDTrainer,
    MuonWithAdamW,
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.acceptance import difference
from draft_opd_trl.files import write_atomically
from draft_opd_trl.prompts import tokenize_dataset
from draft_opd_trl.report import plot_acceptance


POCKET = Path(__file__).resolve().parent
OUTPUT = Path("outputs")


@dataclass
class Recipe:
    """Settings both arms share."""

    steps: int = 300
    batch_size: int = 8
    num_anchors: int = 32
    # Where SFT stood still: the rate the shipped drafter's last quarter was trained at.
    learning_rate: float = 4e-4
    texts: int = 1600
    max_new_tokens: int = 512
    eval_prompts: int = 400
    # Of these, measured during training too.
    watched_prompts: int = 64


def read_prompts(tokenizer: Any, name: str, count: int) -> list[list[int]]:
    """The first `count` tokenised prompts of a shipped file."""
    dataset = load_dataset("json", data_files=str(POCKET / "prompts" / name), split="train")
    return list(tokenize_dataset(dataset.select(range(count)), tokenizer, None, name=name)["prompt_ids"])


def _train(
    origin: str,
    folder: Path,
    lmbda: float,
    steps: int,
    recipe: Recipe,
    seed: int,
    target: Any,
    tokenizer: Any,
    texts: Dataset,
    watched: Dataset,
) -> tuple[DraftOPDTrainer, float]:
    """One arm, measured on `watched` on its way; returns its trainer and the seconds that training alone took."""
    config = DraftOPDConfig(
        output_dir=str(folder),
        lmbda=lmbda,
        max_steps=steps,
        seed=seed,
        rollout_source="dataset",
        per_device_train_batch_size=recipe.batch_size,
        num_anchors=recipe.num_anchors,
        max_completion_length=recipe.max_new_tokens,
        save_strategy="no",
        logging_steps=max(steps // 3, 1),
        eval_strategy="steps",
        eval_on_start=True,
        report_to="none",
        disable_tqdm=False,  # quiet logging, set below, would turn the bar off too
    )
    drafter = load_drafter(origin)
    optimizer = MuonWithAdamW(drafter.parameters(), lr=recipe.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    trainer = DraftOPDTrainer(
        drafter,
        target,
        config,
        train_dataset=texts,
        eval_dataset=watched,
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
    )
    start = time.perf_counter()
    trainer.train()
    measuring = sum(log.get("eval_runtime", 0) for log in trainer.state.log_history)
    seconds = time.perf_counter() - start - measuring
    trainer.save_model()
    return trainer, seconds


def step_parts(trainer: DraftOPDTrainer) -> dict[str, float]:
    """Mean seconds a step spends in each part, over the whole run."""
    logs = [log for log in trainer.state.log_history if "step_time" in log]
    names = [name for name in logs[0] if name.startswith("time/") or name == "step_time"]
    return {name: sum(log[name] for log in logs if name in log) / len(logs) for name in names}


def run_quickstart(args: DraftOPDConfig, recipe: Recipe | None = None, kind: str = "dflash") -> dict[str, Any]:
    """
    Train both arms, measure all drafters on the same held-out prompts, write `outputs/quickstart/`.

    Args:
        args ([`DraftOPDConfig`]): `seed`, `max_steps` where positive, and `output_dir` where given, are taken from it.
        recipe ([`Recipe`], *optional*): Settings both arms share.
        kind (`str`, *optional*, defaults to `"dflash"`): Which shipped drafter to start from; others than DFlash
            write to `outputs/quickstart-<kind>/`.

    Raises:
        `SystemExit`: No drafter of that kind is shipped or built.

    Returns:
        What `results.json` holds.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    recipe = recipe or Recipe()
    if args.max_steps > 0:
        recipe.steps = args.max_steps
    # "trainer_output" is what transformers fills in where no --output_dir was given.
    named = "quickstart" if kind == "dflash" else f"quickstart-{kind}"
    output = OUTPUT / named if args.output_dir == "trainer_output" else Path(args.output_dir)
    origin = str(POCKET / f"drafter-{kind}")
    if not Path(origin, "config.json").is_file():
        raise SystemExit(f"There is no {origin}. Build it with `examples/pocket/build.py drafter --drafter {kind}`.")
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32).to(device)
    target = Target(model)
    settings = SpeculationSettings(recipe.max_new_tokens, stop_token_ids(model, tokenizer), batch_size=64)
    drafter = load_drafter(origin).to(device).bind(target)

    prompts = read_prompts(tokenizer, "quickstart.jsonl", min(recipe.steps * recipe.batch_size, recipe.texts))
    held_out = read_prompts(tokenizer, "heldout.jsonl", recipe.eval_prompts)
    print(f"The target writes {len(prompts)} texts to train on …")
    texts = speculate(target, drafter, prompts, settings)
    dataset = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": texts.completions()})
    watched = Dataset.from_dict({"prompt_ids": held_out[: recipe.watched_prompts]})
    written = time.perf_counter() - started

    start = time.perf_counter()
    plain = speculate(target, None, held_out, settings)
    plain_speed = int(plain.completion_lengths.sum()) / (time.perf_counter() - start)
    reports = {"start": measure_acceptance(target, drafter, held_out, settings, progress="Judging the start")}
    seconds = {"texts": written}
    steps, parts, histories = {"opd": recipe.steps, "sft": recipe.steps}, {}, {}
    for name, lmbda in (("opd", 1.0), ("sft", 0.0), ("sft-equal-time", 0.0)):
        if name == "sft-equal-time":
            # As many SFT steps as fit the time Draft-OPD took, with a schedule of their own.
            steps[name] = max(round(recipe.steps * seconds["opd"] / seconds["sft"]), 1)
        print(f"Training {name}: {steps[name]} steps …")
        trainer, seconds[name] = _train(
            origin,
            output / f"drafter-{name}",
            lmbda,
            steps[name],
            recipe,
            args.seed,
            model,
            tokenizer,
            dataset,
            watched,
        )
        parts[name], histories[name] = step_parts(trainer), trainer.state.log_history
        reports[name] = measure_acceptance(
            trainer.target, trainer.drafter, held_out, settings, progress=f"Judging {name}"
        )

    changed = {
        name: sum(ours != theirs for ours, theirs in zip(report.completions, plain.completions(), strict=True))
        for name, report in reports.items()
    }
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
        "seconds": {**seconds, "total": time.perf_counter() - started},
        "seconds_a_step": parts,
        "texts_changed": changed,
        "plain_tokens_per_second": plain_speed,
        "drafters": {name: report.summary() for name, report in reports.items()},
    }
    write_atomically(output / "results.json", json.dumps(results, indent=2))
    write_atomically(output / "results.md", table(results))
    named = {LABELS[name]: report for name, report in reports.items()}
    plot_acceptance(named, output / "tau.png", {LABELS[name]: history for name, history in histories.items()})
    print("\n" + table(results))
    print(
        f"\nWritten to {output}: results.json, results.md, tau.png, drafter-opd, drafter-sft, drafter-sft-equal-time"
    )
    return results


LABELS = {
    "start": "start (SFT plateau)",
    "sft": "SFT continued, equal steps",
    "sft-equal-time": "SFT continued, equal time",
    "opd": "Draft-OPD",
}


def table(results: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    slots = len(results["drafters"]["start"]["acceptance_by_slot"])
    head = [
        "drafter",
        "τ",
        "steps",
        "training s",
        "speedup",
        "texts changed",
        *(f"≥ {k}" for k in range(1, slots + 1)),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, label in LABELS.items():
        drafter = results["drafters"][name]
        speedup = drafter["tokens_per_second"] / results["plain_tokens_per_second"]
        trained = f"{results['seconds'][name]:.0f}" if name in results["steps"] else "–"
        cells = [
            label,
            f"{drafter['acceptance_length']:.3f}",
            str(results["steps"].get(name, "–")),
            trained,
            f"{speedup:.2f}×",
            f"{results['texts_changed'][name]} of {results['prompts']}",
            *(f"{share:.0%}" for share in drafter["acceptance_by_slot"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for key, label in (("opd_minus_sft", "equal steps"), ("opd_minus_sft_equal_time", "equal wall time")):
        d = results[key]
        lines.append(
            f"\nDraft-OPD − SFT continued at {label}: **{d['mean']:+.3f} τ** "
            f"[{d['low']:+.3f}, {d['high']:+.3f}] (paired 95 % bootstrap over {results['prompts']} prompts)"
        )
    lines.append(
        "\nτ: tokens committed per verification at temperature 0, recovered or bonus token counted. ≥ k: share of "
        "blocks whose first k proposals were all accepted. Speedup: over plain decoding by the same engine, batch 64."
    )
    return "\n".join(lines)
