"""Kinds of drafters under the same recipes: does what Draft-OPD gains add to what an architecture gains?

    python examples/benchmarks/kinds.py
    python examples/benchmarks/kinds.py --drafters dspark causal_lm --seeds 0

Each shipped drafter goes on from its SFT, on the same texts, in the two worlds of the study of recipes: by SFT for
equal steps and for equal time, and by Draft-OPD; where the target draws, with proposals that are drawn, too. Rates are
those that the study chose for DFlash. Every run is a process of its own on one core and a file of its own, so that
what was stopped goes on where it was. Ends with the time a block takes, by kind, one thread, one text at a time; with
tables, and one JSON line.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from recipes import (
    DEFAULT,
    EQUAL_TIME,
    MEASURES,
    POCKET,
    SFT,
    START,
    Job,
    Study,
    StudyArguments,
    by_recipe,
    equal_time_steps,
    gains,
    load_world,
    read_prompts,
    spread,
    write_texts,
)
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from draft_opd_trl import SpeculationSettings, load_drafter, measure_acceptance, stop_token_ids
from draft_opd_trl.core.files import write_atomically


PUBLISHED, DRAWN = "SFT continued, DSpark's published loss", "default recipe, drawn proposals"
BOTH = f"{DRAWN}, DSpark's published loss"
ROWS = {0.0: (SFT, DEFAULT), 1.0: (SFT, PUBLISHED, DEFAULT, DRAWN, BOTH)}
# Of the T = 1 rows, what the kinds that DSpark's loss was not made for are spared.
SPARED = {"dflash-narrow": (BOTH,), "causal_lm": (PUBLISHED, BOTH)}
RATES = {0.0: 2e-3, 1.0: 1e-3}


@dataclass
class KindsArguments(StudyArguments):
    """How much of it."""

    output_dir: str = field(default="outputs/kinds", metadata={"help": "Runs and tables."})
    drafters: list[str] = field(
        default_factory=lambda: ["dflash-narrow", "dspark", "causal_lm"], metadata={"help": "Shipped ones."}
    )
    paced_steps: int = field(default=60, metadata={"help": "Steps of a run that only tells what a step costs."})
    timed_prompts: int = field(default=16, metadata={"help": "Texts over which a block is timed, three times over."})

    @property
    def texts_dir(self) -> Path:
        # A kind's runs stand in a folder of their own, and all kinds learn from the same texts.
        return Path(self.output_dir).parent

    def options(self, temperature: float, recipe: str) -> dict[str, Any]:
        own = {
            PUBLISHED: {"lmbda": 0.0, "accepted_loss": "ce_tv", "teacher_temperature": 1.0},
            DRAWN: {"sample_proposals": True},
            BOTH: {"sample_proposals": True, "accepted_loss": "ce_tv", "teacher_temperature": 1.0},
        }
        return own.get(recipe) or super().options(temperature, recipe)

    def measures(self, temperature: float, options: dict[str, Any]) -> dict[str, tuple[float, bool]]:
        return ways_of(temperature)


def ways_of(temperature: float) -> dict[str, tuple[float, bool]]:
    """Both ways of proposing, where there are two, under the world's own verification."""
    return {name: how for name, how in MEASURES.items() if how[0] == temperature}


def study_of(args: KindsArguments, name: str, suffix: str = "", **changes: Any) -> Study:
    """The runs that start from one drafter, in a folder of their own."""
    origin, output_dir = str(POCKET / f"drafter-{name}"), f"{args.output_dir}/{name}{suffix}"
    return Study(replace(args, origin=origin, output_dir=output_dir, drafters=[name], **changes))


def step_costs(args: KindsArguments, name: str) -> dict[float, float]:
    """What a step of the default recipe costs in steps of SFT: short runs, one at a time and in turns."""
    study = study_of(args, name, "-pace", workers=1, eval_prompts=4)
    turns = [(seed, recipe) for seed in args.seeds for recipe in (SFT, DEFAULT)]
    runs = study.everywhere(
        f"{name}, pace", lambda t: [(t, recipe, RATES[t], seed, args.paced_steps) for seed, recipe in turns]
    )
    return {t: equal_time_steps(some) / args.paced_steps for t, some in runs.items()}


def run_kind(args: KindsArguments, name: str, costs: dict[float, float]) -> dict[float, list[dict[str, Any]]]:
    """All runs that start from one drafter, by the temperature of their world."""
    study = study_of(args, name)

    def jobs(temperature: float, recipes: tuple[str, ...], steps: int) -> list[Job]:
        return [(temperature, recipe, RATES[temperature], seed, steps) for recipe in recipes for seed in args.seeds]

    def rows(temperature: float) -> tuple[str, ...]:
        return tuple(recipe for recipe in ROWS[temperature] if recipe not in SPARED.get(name, ()))

    start = study.everywhere(f"{name}, start", lambda t: [(t, START, 0.0, args.seeds[0], 0)])
    runs = study.everywhere(name, lambda t: jobs(t, rows(t), args.steps))
    equal = study.everywhere(f"{name}, equal time", lambda t: jobs(t, (EQUAL_TIME,), round(args.steps * costs[t])))
    return {t: start[t] + runs[t] + equal[t] for t in args.temperatures}


def table(runs: dict[str, list[dict[str, Any]]], temperature: float) -> str:
    """Mean and spread of every recipe of every kind in one world, and its gain over SFT continued, in Markdown."""
    ways = ways_of(temperature)
    lines = [
        f"| drafter | recipe | steps | τ, {' | τ, '.join(ways)} | gain |",
        "|---" * (4 + len(ways)) + "|",
    ]
    for name, results in runs.items():
        for recipe, some in by_recipe(results).items():
            taus = [spread([one["tau"][way] for one in some], ".3f") for way in ways]
            gained = "" if recipe in (START, SFT) else interval(gains(results, recipe, SFT, temperature))
            cells = [name, recipe, str(some[0]["steps"]), *taus, gained]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """The mean, and the least and the most of all seeds."""
    return f"{statistics.mean(values):+.1%} [{min(values):+.1%}, {max(values):+.1%}]"


def block_seconds(args: KindsArguments) -> dict[str, dict[str, float]]:
    """Seconds a block takes in the drafter and in the target, and K, by drafter: each in turn, the least of three."""
    torch.set_num_threads(1)
    tokenizer, target = load_world()
    prompts = read_prompts(tokenizer, "heldout.jsonl", args.timed_prompts)
    settings = SpeculationSettings(128, stop_token_ids(target.model, tokenizer), batch_size=1)
    found: dict[str, dict[str, float]] = {}
    for _ in range(3):
        for name in tqdm(args.drafters, desc="timing blocks"):
            drafter = load_drafter(str(POCKET / f"drafter-{name}")).bind(target)
            report = measure_acceptance(target, drafter, prompts, settings)
            blocks = sum(len(accepted) for accepted in report.accepted)
            spent = {"draft": report.draft_seconds / blocks, "verify": report.verify_seconds / blocks}
            best = found.get(name, spent)
            found[name] = {part: min(best[part], spent[part]) for part in spent} | {"K": drafter.num_draft_tokens}
    return found


def told(
    found: dict[str, dict[float, list[dict[str, Any]]]],
    times: dict[str, dict[str, float]],
    costs: dict[str, dict[float, float]],
) -> tuple[list[str], dict[str, Any]]:
    """Tables, and what the last line says: mean gains over the seeds, of each kind and over the first one."""
    first, tables, summary = next(iter(found)), [], {}
    for t in found[first]:
        runs = {name: by_temperature[t] for name, by_temperature in found.items()}
        tables.append(f"Trained and verified at T = {t:g}:\n\n{table(runs, t)}")
        for name, results in runs.items():
            gained = {
                "opd": gains(results, DEFAULT, SFT, t),
                "opd_equal_time": gains(results, DEFAULT, EQUAL_TIME, t),
            }
            if name != first:
                gained["start_over_first"] = gains(results, START, START, t, runs[first])
                gained["sft_over_first"] = gains(results, SFT, SFT, t, runs[first])
                gained["opd_over_first"] = gains(results, DEFAULT, DEFAULT, t, runs[first])
            gained = {part: values for part, values in gained.items() if values}
            summary[f"{name}_t{t:g}"] = {part: statistics.mean(values) for part, values in gained.items()}
            tables.append("\n".join(f"- {name}, {part}: {interval(values)}" for part, values in gained.items()))
    worlds = found[first]
    steps = " | ".join(f"a step, T = {t:g}" for t in worlds)
    lines = [
        f"| drafter | K | ms a block in the drafter | in the target | {steps} |",
        "|---" * (4 + len(worlds)) + "|",
    ]
    for name, spent in times.items():
        cells = [name, str(spent["K"]), *(f"{1e3 * spent[part]:.2f}" for part in ("draft", "verify"))]
        lines.append("| " + " | ".join([*cells, *(f"{costs[name][t]:.2f}" for t in worlds)]) + " |")
    tables.append("\n".join(lines))
    return tables, summary | {"block_ms": {name: 1e3 * spent["draft"] for name, spent in times.items()}}


def main(args: KindsArguments) -> None:
    for temperature in args.temperatures:
        write_texts(study_of(args, args.drafters[0]).args, temperature)
    costs = {name: step_costs(args, name) for name in args.drafters}
    found = {name: run_kind(args, name, costs[name]) for name in args.drafters}
    times = block_seconds(args)
    tables, summary = told(found, times, costs)
    folder = Path(args.output_dir)
    write_atomically(folder / "tables.md", "\n\n".join(tables) + "\n")
    write_atomically(
        folder / "results.json", json.dumps({"runs": found, "blocks": times, "step_costs": costs}, indent=2)
    )
    print("\n\n".join(tables))
    print(json.dumps({"seeds": args.seeds, "over": args.drafters[0], **summary}))


if __name__ == "__main__":
    main(*HfArgumentParser(KindsArguments).parse_args_into_dataclasses())
