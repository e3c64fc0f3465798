"""A real language model, from nothing to served: a drafter for SmolLM2-135M-Instruct, on two CPU cores.

    python examples/smollm/real.py
    python examples/smollm/real.py --quick
    python examples/smollm/real.py --target FOLDER --prompts train.jsonl --suites gsm8k.jsonl,instruct.jsonl

Training is `draft-opd` commands, each printed before it runs: a new drafter, SFT to a plateau, then from there, on the
same texts, SFT continued against Draft-OPD and its controls, at equal steps and at equal time; evaluation of all by
replay, and of the first seed's by speculation; speeds. The same command goes on where it was stopped. `--quick` starts
from the shipped drafter, with one seed and no controls. Ends by printing one JSON line.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, stop_token_ids
from draft_opd_trl.cli import main as draft_opd
from draft_opd_trl.core.files import write_atomically
from draft_opd_trl.decoding.acceptance import difference, join_reports
from draft_opd_trl.evaluation.measure import evaluate_drafters
from draft_opd_trl.evaluation.results import read_reports
from draft_opd_trl.evaluation.suites import SUITES, load_suite
from draft_opd_trl.folders.run_state import checkpoints_in
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.rows import load_prompts
from draft_opd_trl.training.loading import load_pair


HERE = Path(__file__).resolve().parent
# By kind, at the end of SFT.
SHIPPED = {kind: HERE / f"drafter-{kind}-sft" for kind in ("eagle3", "dflash")}
SFT, EQUAL_TIME, OPD = "SFT continued", "SFT continued, equal time", "Draft-OPD"
# The recipe of each.
ARMS = {SFT: "sft", OPD: "default", EQUAL_TIME: "sft", "Spec-AUF": "auf", "D-PACE": "dpace"}
ON_POLICY = ("default", "auf")
OWN_TIMES = ("replay", "scoring", "forward", "backward")
QUICK_ARMS = [SFT, OPD, EQUAL_TIME]
# Shapes of new drafters, whose folders are at most 16 MB in bfloat16.
NEW = {
    "eagle3": ["draft_vocab_size=4096", "num_draft_tokens=4"],
    "dflash": ["num_hidden_layers=2", "block_size=8"],
    "dspark": ["num_hidden_layers=1", "block_size=6", "markov_rank=32"],
}
# Most blocks of a text. Text blocks of drafters under the target's head, of 49,152 tokens, are dear and overlap: of
# them a quarter.
BLOCKS, SFT_BLOCKS = 64, {"eagle3": 64, "dflash": 16, "dspark": 16}
# Peak rates of arms that teach text blocks and of those on-policy, each the best that was tried on other prompts;
# DSpark's are DFlash's.
RATES = {"eagle3": (1e-3, 1e-3), "dflash": (5e-4, 2e-3), "dspark": (5e-4, 2e-3)}


@dataclass
class RealArguments:
    """Settings that all arms share."""

    target: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "Path or id."})
    prompts: str = field(default="openai/gsm8k", metadata={"help": "To train on: a file, or that data set."})
    suites: str = field(default="gsm8k,mt-bench", metadata={"help": "To judge on: suites or files, with commas."})
    kind: str = field(default="eagle3", metadata={"help": "Kind of drafter, `start` too.", "choices": list(NEW)})
    start: str | None = field(default=None, metadata={"help": "A drafter at its plateau, in place of a new one."})
    output_dir: str = field(default="outputs/smollm", metadata={"help": "Everything goes there."})
    sft_steps: int = field(default=3000, metadata={"help": "Of SFT, from a new drafter to its plateau."})
    steps: int = field(default=300, metadata={"help": "Of each arm from there."})
    learning_rate: float | None = field(default=None, metadata={"help": "Of every arm; by default, each its best."})
    seeds: int = field(default=3, metadata={"help": "Runs of each arm."})
    arms: list[str] = field(default_factory=lambda: list(ARMS), metadata={"help": "Which of them."})
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata={"help": "To judge at."})
    eval_prompts: int = field(default=100, metadata={"help": "Of each suite."})
    decoded_prompts: int = field(default=100, metadata={"help": "Of the first suite, decoded too."})
    eval_batch_size: int = field(default=16, metadata={"help": "Texts decoded side by side, judging."})
    speed_prompts: int = field(default=16, metadata={"help": "To take speeds on; 0 takes none."})
    store_gib: float = field(default=8.0, metadata={"help": "Disk for the target's states of texts it has read."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest text."})
    quick: bool = field(default=False, metadata={"help": "From the shipped drafter, in 20 minutes."})

    def __post_init__(self) -> None:
        if self.quick:
            if self.start is None and self.kind not in SHIPPED:
                raise ValueError(f"No {self.kind} drafter ships. Give --start, or --kind {' or '.join(SHIPPED)}.")
            self.start = self.start or str(SHIPPED[self.kind])
            self.arms = QUICK_ARMS
            self.steps, self.seeds, self.eval_prompts, self.temperatures = 48, 1, 40, [0.0]
            self.decoded_prompts, self.speed_prompts = 8, min(self.speed_prompts, 3)
            self.suites = self.suites.split(",")[0]
        self.output = Path(self.output_dir)


def fast_dtype() -> str:
    """bfloat16 where a GPU or the CPU has instructions for it, for what is only trained on."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    quick = os.path.exists("/dev/nvidia0") or "avx512_bf16" in flags or "amx_bf16" in flags
    return "bfloat16" if quick else "float32"


class ReadOnce:
    """A target that keeps what it read of each batch, for drafters that are measured one after another."""

    def __init__(self, target: Target) -> None:
        self._target, self._read = target, {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def forward_text(self, tokens: torch.Tensor, layers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if (tokens, tuple(layers)) not in self._read:  # a tensor is found by which one it is
            self._read[tokens, tuple(layers)] = self._target.forward_text(tokens, layers)
        return self._read[tokens, tuple(layers)]


class Journey:
    """The stages, each skipped where its result is there."""

    def __init__(self, args: RealArguments) -> None:
        self.args, self.output = args, args.output
        self.prompts = self._prompts_file()

    def _prompts_file(self) -> str:
        """Prompts to train on, as a file; those of GSM8K are told apart from the suite's by their split."""
        if self.args.prompts != SUITES["gsm8k"].dataset:
            return self.args.prompts
        file = self.output / "prompts.jsonl"
        if not file.exists():
            suite = SUITES["gsm8k"]
            rows = load_prompts(suite.dataset, suite.config, "train")[suite.column]
            asked = [{"prompt": [{"role": "user", "content": suite.template.format(row)}]} for row in rows]
            write_atomically(file, "".join(json.dumps(row) + "\n" for row in asked))
        return str(file)

    def run(self, done: Path, *words: Any) -> None:
        """A command, unless the file that it leaves is there."""
        words = [str(word) for word in words]
        if done.exists():
            return
        print(f"\n$ draft-opd {shlex.join(words)}", flush=True)
        draft_opd(words)  # which exits where it fails

    def start(self) -> Path:
        """The drafter that all arms begin from."""
        args = self.args
        if args.start is not None:
            return Path(args.start)
        new, sft = self.output / "new", self.output / "sft"
        shape = ["--set", *NEW[args.kind], "--prompts", self.prompts, "--max_new_tokens", args.max_new_tokens]
        self.run(
            new / "config.json", "init", "--target", args.target, "--kind", args.kind, "--output_dir", new, *shape
        )
        self.train(sft, new, args.sft_steps, "sft", 4e-3, 0)
        return sft

    def train(self, folder: Path, start: Path, steps: int, recipe: str, rate: float, seed: int) -> None:
        fast = fast_dtype()
        resumed = ["--resume_from_checkpoint", "true"] if checkpoints_in(folder) else []
        blocks = BLOCKS if recipe in ON_POLICY else SFT_BLOCKS[self.args.kind]
        self.run(
            folder / "results.json",
            *("train", "--model", start, "--teacher", self.args.target, "--dataset_name", self.prompts),
            *("--output_dir", folder, "--max_steps", steps, "--recipe", recipe, *resumed),
            *("--learning_rate", rate, "--seed", seed),
            *("--logging_steps", max(1, min(10, steps // 6))),
            *("--rollout_source", "generate", "--max_completion_length", self.args.max_new_tokens),
            # Written 64 side by side, once for all runs.
            *("--rollout_batch_size", 64, "--steps_per_generation", 8, "--text_cache_dir", self.output / "texts"),
            *("--state_store_gib", self.args.store_gib, "--state_store_dir", self.output / "states"),
            *("--num_anchors", blocks, "--num_eval_prompts", 24, "--save_steps", 100, "--save_total_limit", 1),
            *("--teacher_model_init_kwargs", json.dumps({"dtype": fast}), "--bf16", str(fast == "bfloat16").lower()),
            *("--report_to", "none"),
        )

    def arm(self, name: str, seed: int) -> Path:
        return self.output / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{seed}"

    def train_arms(self, start: Path) -> None:
        """Equal time is as many SFT steps as fit the time that Draft-OPD's took, with a schedule of their own."""
        args = self.args
        for seed in range(args.seeds):
            for name in args.arms:
                steps = args.steps
                if name == EQUAL_TIME:
                    ratio = seconds_a_step(self.arm(OPD, seed)) / seconds_a_step(self.arm(SFT, seed))
                    steps = max(round(steps * ratio), 1)
                rate = args.learning_rate or RATES[args.kind][ARMS[name] in ON_POLICY]
                self.train(self.arm(name, seed), start, steps, ARMS[name], rate, seed)

    def evaluate(self, start: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        All drafters on the same prompts by replay, by law and name: what was measured, and where each prompt's is.

        Then those of the first seed by speculation, under the first law: whether a text changed. In float32, in which
        none does.
        """
        args, found = self.args, {}
        folders = {"start": start} | {
            folder.name: folder
            for seed in range(args.seeds)
            for folder in (self.arm(name, seed) for name in args.arms)
        }
        target, drafters, tokenizer = load_pair([str(path) for path in folders.values()], args.target, "float32")
        by_name = dict(zip(folders, drafters, strict=True))
        stops = stop_token_ids(target.model, tokenizer)
        for suite in args.suites.split(","):
            rows = tokenize_dataset(load_suite(suite, None, args.eval_prompts), tokenizer, None, {}, name=suite)
            prompts = list(rows["prompt_ids"])
            for temperature in args.temperatures:
                law = f"{Path(suite).stem}-t{temperature:g}"
                settings = SpeculationSettings(
                    args.max_new_tokens, stops, SamplingParams(temperature), batch_size=args.eval_batch_size
                )
                place = self.output / "evaluated" / law
                once = ReadOnce(target)
                measured = evaluate_drafters(
                    once, by_name, prompts, settings, results=place, progress=law, replay=True
                )
                found[law] = {
                    name: {**one, "file": f"{place}-{name}.jsonl"} for name, one in measured["drafters"].items()
                }
                if len(found) == 1:
                    few = {name: by_name[name] for name in ("start", *(self.arm(name, 0).name for name in args.arms))}
                    place, label = self.output / "decoded" / law, f"{law}, decoded"
                    asked = prompts[: args.decoded_prompts]
                    decoded = evaluate_drafters(target, few, asked, settings, results=place, progress=label)
        return found, decoded

    def speeds(self, folder: Path) -> dict[str, Any]:
        """Tokens a second of transformers and of this package, in turns."""
        file = self.output / "speeds.json"
        if not self.args.speed_prompts:
            return {}
        if not file.exists():
            script = HERE.parent / "benchmarks" / "engine.py"
            words = [sys.executable, script, "--target", self.args.target, "--drafter", folder]
            words += ["--suite", self.args.suites.split(",")[0], "--prompts", self.args.speed_prompts]
            words += ["--speed-prompts", self.args.speed_prompts, "--max-new-tokens", self.args.max_new_tokens]
            words += ["--batch-sizes", 1, 8]
            print(f"\n$ {shlex.join(map(str, words))}", flush=True)
            done = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, text=True, check=True)
            print(done.stdout)
            write_atomically(file, done.stdout.strip().splitlines()[-1])
        return json.loads(file.read_text())


def seconds_a_step(folder: Path) -> float:
    """
    Of training alone, by the run's own log, without its first window.

    And without writing and reading the texts, which the first arm does for all others.
    """
    (newest,) = checkpoints_in(folder)[-1:]
    log = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    times = [sum(entry[f"time/{part}"] for part in OWN_TIMES) for entry in log if "step_time" in entry]
    return statistics.median(times[1:] or times)


def gain(journey: Journey, by_name: dict[str, dict[str, Any]], arm: str, over: str) -> dict[str, Any] | None:
    """τ of an arm over another's less 1: by seed, and the lowest end of their paired 95 % intervals."""
    values, lows = [], []
    for seed in range(journey.args.seeds):
        names = [journey.arm(name, seed).name for name in (arm, over)]
        if not set(names) <= by_name.keys():
            return None
        mine, other = (join_reports(list(read_reports(Path(by_name[name]["file"])).values())) for name in names)
        change = difference(mine, other)
        values.append(change["mean"] / other.acceptance_length)
        lows.append(change["low"] / other.acceptance_length)
    return {"mean": statistics.mean(values), "by_seed": values, "low": min(lows)}


def all_gains(journey: Journey, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By law: of Draft-OPD over every other arm, and of those over SFT continued."""
    pairs = [(OPD, arm) for arm in journey.args.arms if arm != OPD]
    pairs += [(arm, SFT) for arm in journey.args.arms if arm not in (OPD, SFT)]
    return {
        law: {f"{arm} over {over}": gain(journey, by_name, arm, over) for arm, over in pairs}
        for law, by_name in found.items()
    }


def told(
    journey: Journey, found: dict[str, Any], decoded: dict[str, Any], speeds: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The last line: of the first suite and temperature, means over seeds; gains are relative."""
    law, by_name = next(iter(found.items()))

    def mean(arm: str) -> float | None:
        taus = [by_name[name]["acceptance_length"] for name in names_of(journey, arm) if name in by_name]
        return statistics.mean(taus) if taus else None

    line = {"law": law, "tau_start": by_name["start"]["acceptance_length"], "tau_sft": mean(SFT), "tau_opd": mean(OPD)}
    for key, over in (("gain_equal_steps", SFT), ("gain_equal_time", EQUAL_TIME)):
        change = gain(journey, by_name, OPD, over) or {"mean": None, "low": None}
        line[key], line[f"{key}_low"] = change["mean"], change["low"]
    line["speedup_generate_batch1"] = speeds.get("ours, batch 1", {}).get("over_generate")
    checked = [one["texts"] for one in decoded["drafters"].values() if one["texts"]]
    line["texts_changed"] = sum(one["changed"] for one in checked) if checked else None
    return {**line, "seconds": round(seconds)}


def names_of(journey: Journey, arm: str) -> list[str]:
    return ["start"] if arm == "start" else [journey.arm(arm, seed).name for seed in range(journey.args.seeds)]


def table(journey: Journey, found: dict[str, Any]) -> str:
    """τ by arm and law, mean over seeds, their range and the gain over SFT continued, in Markdown."""
    lines = ["| drafter | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for arm in ("start", *journey.args.arms):
        cells = []
        for by_name in found.values():
            taus = [by_name[name]["acceptance_length"] for name in names_of(journey, arm)]
            spread = f" [{min(taus):.3f}, {max(taus):.3f}]" if len(taus) > 1 else ""
            change = gain(journey, by_name, arm, SFT) if arm in journey.args.arms and arm != SFT else None
            cells.append(f"{statistics.mean(taus):.3f}{spread}" + (f", {change['mean']:+.1%}" if change else ""))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: RealArguments) -> dict[str, Any]:
    began = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    journey = Journey(args)
    start = journey.start()
    journey.train_arms(start)
    found, decoded = journey.evaluate(start)
    speeds = journey.speeds(journey.arm(OPD if OPD in args.arms else args.arms[0], 0))
    line = told(journey, found, decoded, speeds, time.perf_counter() - began)
    result = {**line, "gains": all_gains(journey, found), "laws": found, "decoded": decoded, "speeds": speeds}
    write_atomically(args.output / "results.json", json.dumps(result, indent=2))
    write_atomically(args.output / "results.md", table(journey, found) + "\n")
    print(f"\n{table(journey, found)}\n\nWritten to {args.output}: results.json, results.md, the trained drafters")
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    main(*HfArgumentParser(RealArguments).parse_args_into_dataclasses())
