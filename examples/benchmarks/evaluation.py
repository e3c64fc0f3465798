"""What evaluation costs, and that its counts are right, on the pocket world.

    python examples/benchmarks/evaluation.py throughput  # against a loop of one prompt at a time, in one run
    python examples/benchmarks/evaluation.py agreement   # report, metric and a recount from the raw blocks
    python examples/benchmarks/evaluation.py overhead    # share of training time, at the default frequency

Each ends by printing one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import evaluate
import torch
from engine import Engines
from transformers import AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    DraftOPDConfig,
    DraftOPDTrainer,
    SamplingParams,
    SpeculationSettings,
    measure_acceptance,
    speculate,
)
from draft_opd_trl.evaluation.suites import load_suite  # noqa: E402
from draft_opd_trl.metrics import metric_path  # noqa: E402


def throughput(args: argparse.Namespace) -> dict:
    """
    Tokens a second of `measure_acceptance` over those of transformers' own DFlash, one prompt after the other.

    By CPU time on one thread, so that other work on the machine does not count.
    """
    torch.set_num_threads(1)
    engines = Engines("cpu", 512)
    prompts = read_prompts(engines.tokenizer, "heldout.jsonl", args.prompts)

    def measured(batch_size: int) -> float:
        settings = SpeculationSettings(512, engines.stops, batch_size=batch_size)
        start = time.process_time()
        tokens = measure_acceptance(engines.target, engines.drafter, prompts, settings).tokens
        return tokens / (time.process_time() - start)

    def loop() -> float:
        start = time.process_time()
        tokens = sum(map(len, engines.native_dflash(prompts)))
        return tokens / (time.process_time() - start)

    runs = [(loop(), measured(1), measured(16)) for _ in range(args.repeats)]
    result = {"prompts": len(prompts), "tokens_per_second": runs}
    for place, name in enumerate(("batch_1", "batch_16"), start=1):
        ratios = [run[place] / run[0] for run in runs]
        result[name] = [statistics.median(ratios), min(ratios), max(ratios)]
    return result


def recount(rollout) -> tuple[int, int]:
    """Committed tokens and verifications from drafted tokens and text alone; the record's counts are not looked at."""
    committed = verifications = 0
    texts, lengths = rollout.tokens.tolist(), rollout.lengths.tolist()
    columns = (getattr(rollout.blocks, name).tolist() for name in ("texts", "anchors", "draft_tokens"))
    for text, anchor, drafted in zip(*columns, strict=True):
        after = texts[text][anchor + 1 : lengths[text]]
        run = 0
        while run < min(len(drafted), len(after)) and drafted[run] == after[run]:
            run += 1
        committed += min(run + 1, len(after))
        verifications += 1
    return committed, verifications


def agreement(args: argparse.Namespace) -> dict:
    """τ of the report, of the metric and of the recount, over the same draws."""
    engines, metric = Engines("cpu", 512), evaluate.load(metric_path())
    prompts = read_prompts(engines.tokenizer, "heldout.jsonl", args.prompts)
    result = {"prompts": len(prompts)}
    for temperature in (0.0, 1.0):
        settings = SpeculationSettings(512, engines.stops, SamplingParams(temperature), batch_size=16)
        draws = [torch.Generator().manual_seed(0) for _ in range(2)]
        report = measure_acceptance(engines.target, engines.drafter, prompts, settings, draws[0])
        committed, verifications = recount(speculate(engines.target, engines.drafter, prompts, settings, draws[1]))
        lengths = [len(text) for text in report.completions]
        measured = metric.compute(predictions=report.accepted, references=lengths)
        result[f"T={temperature:g}"] = {
            "report": [sum(report.committed), sum(report.verifications), report.acceptance_length],
            "metric": [measured[name] for name in ("committed", "verifications", "acceptance_length")],
            "trainer": report.metrics()["eval_acceptance_length"],
            "recount": [committed, verifications, committed / verifications],
        }
    return result


def overhead(args: argparse.Namespace) -> dict:
    """Share of `train()` that evaluation on 64 prompts takes: `eval_strategy="steps"`, and otherwise defaults."""
    shares = []
    for seed in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            config = DraftOPDConfig(
                folder, eval_strategy="steps", max_steps=40, seed=seed, report_to="none", save_strategy="no"
            )
            trainer = DraftOPDTrainer(
                str(POCKET / "drafter-dflash"),
                AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32),
                config,
                train_dataset=load_suite(str(POCKET / "prompts" / "quickstart.jsonl"), count=320),
                eval_dataset=load_suite("pocket", count=64),
            )
            total = trainer.train().metrics["train_runtime"]
        evaluations = [log["eval_runtime"] for log in trainer.state.log_history if "eval_runtime" in log]
        shares.append(sum(evaluations) / total)
        steps = (total - sum(evaluations)) / config.max_steps
        print(f"{len(evaluations)} × {statistics.mean(evaluations):.2f} s of {total:.1f} s; a step {steps:.2f} s")
    return {"eval_steps": config.eval_steps, "share": [statistics.median(shares), min(shares), max(shares)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {part.__name__: part for part in (throughput, agreement, overhead)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(parts[arguments.part](arguments)))
