"""A target whose layers keep a state, a Qwen3.5-shaped hybrid: is Draft-OPD's gain there by replay alone?

    python examples/benchmarks/hybrid.py

Three of the pocket target's four attention layers become Gated DeltaNet, and it is trained again; a DFlash drafter
learns its greedy texts by SFT from nothing, and goes on by SFT and by Draft-OPD for equal steps on the same texts.
Nothing is decoded speculatively: texts are written once, by the target alone, and replay trains and counts along them.
Every part is kept, so that what was stopped goes on where it was. Ends with results.json, a table, and one JSON line.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recipes import (
    DEFAULT,
    POCKET,
    SFT,
    START,
    Study,
    StudyArguments,
    load_world,
    read_prompts,
    write_texts,
)
from transformers import HfArgumentParser

from draft_opd_trl import (
    AcceptanceReport,
    SpeculationSettings,
    Target,
    create_drafter,
    load_drafter,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import atomic_folder, write_atomically
from draft_opd_trl.core.records import Rollout
from draft_opd_trl.decoding.acceptance import difference
from draft_opd_trl.evaluation.by_replay import measure_by_replay


LONGEST = 512
# Of `dflash-narrow`: what leaves a drafter something to learn.
SHAPE = {"block_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@dataclass
class HybridArguments(StudyArguments):
    """How much of it."""

    output_dir: str = field(default="outputs/hybrid", metadata={"help": "Target, texts, runs and the table."})
    temperatures: list[float] = field(default_factory=lambda: [0.0], metadata={"help": "Not to be changed."})
    minutes: float = field(default=13.0, metadata={"help": "Training of the target, one thread."})
    first_steps: int = field(default=800, metadata={"help": "Of SFT from nothing."})
    first_rate: float = field(default=4e-3, metadata={"help": "Its rate."})
    rate: float = field(default=2e-3, metadata={"help": "Of both runs that go on, as the study of recipes chose."})
    steps: int = field(default=300, metadata={"help": "Of both runs that go on."})
    texts: int = field(default=800, metadata={"help": "Texts to train on."})
    eval_prompts: int = field(default=128, metadata={"help": "Held-out prompts."})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "Of both runs that go on."})
    workers: int = field(default=1, metadata={"help": "Runs side by side, one thread each."})

    @property
    def texts_dir(self) -> Path:
        return Path(self.target).parent

    def measures(self, temperature: float, options: dict[str, Any]) -> dict[str, tuple[float, bool]]:
        # All at the end, along one set of texts.
        return {}


def make_target(args: HybridArguments, folder: Path) -> None:
    """The hybrid, trained as the pocket target was; a run that was cut off goes on."""
    if not folder.is_dir():
        options = {"hybrid-of": POCKET / "target", "target": folder, "work-dir": folder.parent, "threads": 1}
        options |= {"minutes": args.minutes, "steps": 10**6}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([sys.executable, str(POCKET / "build.py"), "target", "--cpu", "--fp32", *words], check=True)


def make_drafter(target: Target, tokenizer: Any, folder: Path) -> None:
    """One that has learnt nothing."""
    torch.manual_seed(0)
    mask = tokenizer.convert_tokens_to_ids("<|mask|>")
    drafter = create_drafter("dflash", target, mask_token_id=mask, intermediate_size=144, **SHAPE)
    with atomic_folder(folder) as part:
        drafter.save_pretrained(part)


def held_out(args: HybridArguments, target: Target, tokenizer: Any) -> Dataset:
    """What every drafter is judged along: written once, by the target alone."""
    folder = args.texts_dir / f"heldout-{args.eval_prompts}"
    if not folder.is_dir():
        prompts = read_prompts(tokenizer, "heldout.jsonl", args.eval_prompts)
        settings = SpeculationSettings(LONGEST, stop_token_ids(target.model), batch_size=64)
        texts = speculate(target, None, prompts, settings)
        with atomic_folder(folder) as part:
            Dataset.from_dict({"prompt_ids": prompts, "completion_ids": texts.completions()}).save_to_disk(part)
    return Dataset.load_from_disk(str(folder))


def judge(target: Target, folder: Path, texts: Dataset) -> AcceptanceReport:
    """What speculation would report of a drafter, counted by replay."""
    prompts = list(texts["prompt_ids"])

    def write(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Rollout:
        return Rollout.from_ids(prompts, list(texts["completion_ids"]))

    settings = SpeculationSettings(LONGEST, stop_token_ids(target.model), batch_size=16)
    drafter = load_drafter(str(folder)).bind(target).eval()
    return measure_by_replay(target, drafter, prompts, settings, range(len(prompts)), write=write)


def agreement(target: Target, texts: Dataset) -> float:
    """Mean probability of the greedy token along the texts: how sure of itself the target is."""
    rollout = Rollout.from_ids(list(texts["prompt_ids"]), list(texts["completion_ids"]))
    sure = []
    for first in range(0, len(rollout), 16):
        some = rollout.part(first, min(first + 16, len(rollout)))
        states = target.forward_text(some.tokens, ())[1]
        for row, (start, end) in enumerate(zip(some.prompt_lengths, some.lengths, strict=True)):
            sure.append(target.logits(states[row, start - 1 : end - 1]).softmax(-1).amax(-1))
    return float(torch.cat(sure).mean())


def table(result: dict[str, Any]) -> str:
    """A row a drafter and seed, in Markdown."""
    lines = ["| drafter | seed | τ | over SFT continued |", "|---|---|---|---|"]
    lines.append(f"| SFT from nothing, {result['first_steps']} steps | | {result['start']:.3f} | |")
    for run in result["runs"]:
        gained = run["difference"]
        told = f"{gained['mean']:+.3f} [{gained['low']:+.3f}, {gained['high']:+.3f}]"
        lines.append(f"| SFT continued, {result['steps']} steps | {run['seed']} | {run['sft']:.3f} | |")
        lines.append(f"| Draft-OPD, {result['steps']} steps | {run['seed']} | {run['opd']:.3f} | {told} |")
    return "\n".join(lines)


def main(args: HybridArguments) -> None:
    folder = Path(args.output_dir)
    args.target = str(folder / "target")
    make_target(args, folder / "target")
    tokenizer, target = load_world(args.target)
    if not (folder / "new").is_dir():
        make_drafter(target, tokenizer, folder / "new")
    write_texts(args, 0.0)
    texts = held_out(args, target, tokenizer)
    first = Study(replace(args, origin=str(folder / "new")))
    job = (0.0, SFT, args.first_rate, 0, args.first_steps)
    first.results([job], "SFT from nothing")
    start = first.file(*job).with_suffix("")
    study = Study(replace(args, origin=str(start), output_dir=str(folder / "runs")))
    jobs = [(0.0, recipe, args.rate, seed, args.steps) for seed in args.seeds for recipe in (SFT, DEFAULT)]
    study.results(jobs, "going on")
    reports = [judge(target, study.file(*job).with_suffix(""), texts) for job in jobs]
    pairs = list(zip(args.seeds, reports[::2], reports[1::2], strict=True))
    result = {
        "layer_types": target.config.layer_types,
        "parameters": sum(weight.numel() for weight in target.model.parameters()),
        "top_probability": agreement(target, texts),
        "prompts": len(texts),
        "mean_length": statistics.mean(map(len, texts["completion_ids"])),
        "first_steps": args.first_steps,
        "steps": args.steps,
        "texts": args.texts,
        START: judge(target, start, texts).acceptance_length,
        "runs": [
            {
                "seed": seed,
                "sft": sft.acceptance_length,
                "opd": opd.acceptance_length,
                "difference": difference(opd, sft),
            }
            for seed, sft, opd in pairs
        ],
    }
    write_atomically(folder / "results.json", json.dumps(result, indent=1))
    print(table(result))
    gain = statistics.mean(run["opd"] / run["sft"] - 1 for run in result["runs"])
    print(json.dumps({"seeds": args.seeds, "gain": gain, "start": result[START]}))


if __name__ == "__main__":
    main(*HfArgumentParser(HybridArguments).parse_args_into_dataclasses())
