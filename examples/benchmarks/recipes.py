"""The study of losses and recipes: one starting drafter, one set of texts, equal steps and blocks, many recipes.

    python examples/benchmarks/recipes.py             # every recipe; leading ones on every seed
    python examples/benchmarks/recipes.py --quick     # leading recipes on one seed, rates as the study chose them

Two worlds: the target writes and verifies greedily (T = 0), and it draws (T = 1). In each, the learning rates of the
default recipe and of every control are chosen among the same, on prompts that nothing else is measured on. Every run
is a process of its own on one core and a file of its own, so that a study that was stopped goes on where it was. Ends
by writing tables and a picture, and by printing one JSON line.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arms import (  # noqa: E402
    ADAMW,
    AUF,
    CONTROLS,
    DEFAULT,
    DPACE,
    EQUAL_TIME,
    LEADING,
    PAPER,
    SFT,
    SOFT,
    START,
    TUNED,
    StudyConfig,
    variants,
)
from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    DraftOPDTrainer,
    SamplingParams,
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import atomic_folder, write_atomically  # noqa: E402
from draft_opd_trl.drafters.base import Drafter  # noqa: E402
from draft_opd_trl.evaluation.report import COLORS, new_figure, save_figure  # noqa: E402


# Temperature, recipe, learning rate, seed, steps.
Job = tuple[float, str, float, int, int]
MEASURES = {"T = 0": (0.0, False), "T = 1, argmax": (1.0, False), "T = 1, drawn": (1.0, True)}


@dataclass
class StudyArguments:
    """How much of it."""

    output_dir: str = field(default="outputs/recipes", metadata={"help": "Runs, tables, picture."})
    origin: str = field(default=str(POCKET / "drafter-dflash-narrow"), metadata={"help": "Drafter to start from."})
    target: str = field(default=str(POCKET / "target"), metadata={"help": "Target, of the pocket tokenizer."})
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata={"help": "Worlds: 0 and 1."})
    steps: int = field(default=800, metadata={"help": "Optimizer steps of a run on one seed."})
    long_steps: int = field(default=1600, metadata={"help": "Of the leading recipes' runs on every seed."})
    batch_size: int = field(default=4, metadata={"help": "Texts of a step."})
    num_anchors: int = field(default=32, metadata={"help": "Most blocks of a text."})
    texts: int = field(default=1600, metadata={"help": "Texts to train on."})
    eval_prompts: int = field(default=256, metadata={"help": "Held-out prompts; as many others choose the rates."})
    rates: list[float] = field(
        default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3], metadata={"help": "Muon's rates to choose among."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of the leading recipes."})
    workers: int = field(default=os.cpu_count() or 1, metadata={"help": "Runs side by side, one thread each."})
    quick: bool = field(default=False, metadata={"help": "Leading recipes, one seed, one rate, half of all numbers."})
    quick_rate: float = field(default=2e-3, metadata={"help": "That rate."})

    @property
    def texts_dir(self) -> Path:
        """Where the target's texts are kept."""
        return Path(self.output_dir)

    def options(self, temperature: float, recipe: str) -> dict[str, Any]:
        """Config fields of a recipe."""
        return variants(temperature).get(recipe, variants(temperature)[SFT])

    def measures(self, temperature: float, options: dict[str, Any]) -> dict[str, tuple[float, bool]]:
        """How a recipe's drafter is judged. Proposals are served as they were trained: drawn, or the argmax."""
        return {name: how for name, how in MEASURES.items() if how[1] <= options.get("sample_proposals", False)}


def load_world(folder: str | Path = POCKET / "target") -> tuple[Any, Target]:
    """A target's tokenizer and the target."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), Target(model)


def write_texts(args: StudyArguments, temperature: float) -> Path:
    """What every recipe of a world trains on: written once, by the target alone."""
    folder = args.texts_dir / f"texts-{args.texts}-t{temperature:g}"
    if not folder.is_dir():
        tokenizer, target = load_world(args.target)
        prompts = read_prompts(tokenizer, "quickstart.jsonl", args.texts)
        stops = stop_token_ids(target.model, tokenizer)
        settings = SpeculationSettings(512, stops, SamplingParams(temperature), batch_size=64)
        texts = speculate(target, None, prompts, settings, torch.Generator().manual_seed(0))
        with atomic_folder(folder) as part:
            Dataset.from_dict({"prompt_ids": prompts, "completion_ids": texts.completions()}).save_to_disk(part)
    return folder


def run(args: StudyArguments, temperature: float, recipe: str, rate: float, seed: int, steps: int, file: Path) -> None:
    """Train one recipe and measure it, in a process of its own. Candidates of a rate are measured on more prompts."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer, target = load_world(args.target)
    drafter, seconds = load_drafter(args.origin), 0.0
    options = args.options(temperature, recipe)
    if steps:
        config = StudyConfig(
            str(file.with_suffix("")),
            max_steps=steps,
            seed=seed,
            rollout_source="dataset",
            temperature=temperature,
            per_device_train_batch_size=args.batch_size,
            num_anchors=args.num_anchors,
            max_completion_length=512,
            save_strategy="no",
            logging_steps=max(steps // 4, 1),
            report_to="none",
            disable_tqdm=True,
            **{**options, "learning_rate": rate, "warmup_steps": steps // 20},
        )
        # With PyTorch's own weight decay, which the study's runs had.
        adamw = torch.optim.AdamW(drafter.parameters(), lr=rate) if recipe in ADAMW else None
        trainer = DraftOPDTrainer(
            drafter,
            target.model,
            config,
            train_dataset=Dataset.load_from_disk(str(write_texts(args, temperature))),
            processing_class=tokenizer,
            optimizers=(adamw, None),
        )
        start = time.perf_counter()
        # A run that was ended by a signal left one; its seconds are then those of the rest.
        trainer.train(resume_from_checkpoint=any(Path(config.output_dir).glob("checkpoint-*")))
        seconds = time.perf_counter() - start
        trainer.save_model()
    drafter.bind(target).eval()
    prompts = read_prompts(tokenizer, "heldout.jsonl", 2 * args.eval_prompts)
    ways = args.measures(temperature, options)
    own = {name: how for name, how in ways.items() if how[0] == temperature}
    parts = {"tau": (prompts[: args.eval_prompts], ways)}
    if len(args.rates) > 1 and recipe in TUNED[temperature] and (seed, steps) == (args.seeds[0], args.steps):
        parts["tau_choosing"] = (prompts[args.eval_prompts :], own)
    result = {"recipe": recipe, "rate": rate, "seed": seed, "steps": steps, "seconds": seconds}
    for part, (chosen, measured) in parts.items():
        result[part] = {name: measure(target, drafter, tokenizer, chosen, *how) for name, how in measured.items()}
    write_atomically(file, json.dumps(result))


def measure(
    target: Target, drafter: Drafter, tokenizer: Any, prompts: list[list[int]], law: float, drawn: bool
) -> float:
    """τ under one way of verifying and proposing."""
    stops = stop_token_ids(target.model, tokenizer)
    settings = SpeculationSettings(512, stops, SamplingParams(law), sample_proposals=drawn, batch_size=64)
    return measure_acceptance(target, drafter, prompts, settings, torch.Generator().manual_seed(0)).acceptance_length


class Study:
    """All runs of a study: those done are read, the others made."""

    def __init__(self, args: StudyArguments) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        settings = {name: value for name, value in asdict(args).items() if name not in ("workers", "temperatures")}
        file = self.folder / "settings.json"
        if file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(settings)):
            raise SystemExit(f"{file} is of another study; choose another --output_dir, or the same settings.")
        write_atomically(file, json.dumps(settings, indent=2))

    def file(self, temperature: float, recipe: str, rate: float, seed: int, steps: int) -> Path:
        """Where a run's result is kept."""
        name = f"{recipe}, {rate:g}, {seed}, {steps}".replace(" ", "-")
        return self.folder / f"t{temperature:g}" / f"{name}.json"

    def results(self, jobs: list[Job], label: str) -> list[dict[str, Any]]:
        """What each job gave, in this order."""
        files = [self.file(*job) for job in jobs]
        missing = [(job, file) for job, file in zip(jobs, files, strict=True) if not file.is_file()]
        workers = ProcessPoolExecutor(self.args.workers, get_context("spawn"), max_tasks_per_child=1)
        with workers, tqdm(total=len(missing), desc=label, unit="run") as bar:
            pending = {workers.submit(run, self.args, *job, file): file for job, file in missing}
            for future in as_completed(pending):
                future.result()
                done = json.loads(pending[future].read_text())
                taus = ", ".join(f"{tau:.2f}" for tau in done["tau"].values())
                bar.set_postfix_str(f"{done['recipe']}: τ {taus}")
                bar.update()
        return [json.loads(file.read_text()) for file in files]

    def everywhere(self, label: str, jobs_of: Callable[[float], list[Job]]) -> dict[float, list[dict[str, Any]]]:
        """The results of all worlds' jobs, side by side; by temperature."""
        jobs = {temperature: jobs_of(temperature) for temperature in self.args.temperatures}
        done = iter(self.results([job for part in jobs.values() for job in part], label))
        return {temperature: [next(done) for _ in part] for temperature, part in jobs.items()}


def of_recipe(results: list[dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    return [one for one in results if one["recipe"] == recipe]


def own_tau(result: dict[str, Any], temperature: float, part: str = "tau") -> float:
    """τ under the world's own verification; where proposals may be drawn or not, the better way for this drafter."""
    return max(tau for name, tau in result[part].items() if MEASURES[name][0] == temperature)


def run_study(study: Study) -> dict[float, dict[str, list[dict[str, Any]]]]:
    """
    In every world: choose the rates, run every recipe on one seed, and the leading ones for longer and on every seed.

    Returns:
        By temperature and label, the results of a table.
    """
    args, first = study.args, study.args.seeds[:1]
    for temperature in args.temperatures:
        write_texts(args, temperature)

    def sweep_jobs(temperature: float) -> list[Job]:
        rates = args.rates if len(args.rates) > 1 else []
        return [(temperature, recipe, rate, *first, args.steps) for recipe in TUNED[temperature] for rate in rates]

    sweep = study.everywhere("learning rates", sweep_jobs)
    rate = {temperature: chosen_rates(args, sweep[temperature], temperature) for temperature in args.temperatures}

    def jobs(temperature: float, names: Iterable[str], seeds: list[int], steps: int) -> list[Job]:
        chosen = rate[temperature]
        return [
            (temperature, recipe, chosen.get(recipe, chosen[DEFAULT]), seed, steps)
            for recipe in names
            for seed in seeds
        ]

    def equal_jobs(temperature: float) -> list[Job]:
        return jobs(temperature, [EQUAL_TIME], args.seeds, equal_time_steps(leading[temperature]))

    start = study.everywhere("start", lambda t: jobs(t, [START], first, 0))
    screened = study.everywhere(
        "every recipe", lambda t: [] if args.quick else jobs(t, variants(t), first, args.steps)
    )
    leading = study.everywhere("leading recipes", lambda t: jobs(t, LEADING[t], args.seeds, args.long_steps))
    equal = study.everywhere("equal time", equal_jobs)
    found = {}
    for t in args.temperatures:
        others = [one for one in sweep[t] if one["rate"] != rate[t][one["recipe"]]]
        found[t] = {"one seed": start[t] + screened[t] + others} if screened[t] else {}
        found[t]["every seed"] = start[t] + leading[t] + equal[t]
    return found


def chosen_rates(args: StudyArguments, sweep: list[dict[str, Any]], temperature: float) -> dict[str, float]:
    """Rates of recipes that do not take the default one's; of the tuned, the best on the prompts for choosing."""
    chosen = dict.fromkeys(TUNED[temperature], args.rates[0])
    for one in sorted(sweep, key=lambda one: own_tau(one, temperature, "tau_choosing")):
        chosen[one["recipe"]] = one["rate"]
    return {SOFT: chosen[SFT]} | chosen | ADAMW | {EQUAL_TIME: chosen[SFT], START: 0.0}


def spread(values: list[float], form: str) -> str:
    """Mean and, from two values on, standard deviation."""
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def equal_time_steps(results: list[dict[str, Any]]) -> int:
    """As many steps of SFT as take the time of the default recipe's runs."""
    runs = [of_recipe(results, recipe) for recipe in (DEFAULT, SFT)]
    ours, theirs = (statistics.median(one["seconds"] for one in part) for part in runs)
    return round(runs[0][0]["steps"] * ours / theirs)


def paired(results: list[dict[str, Any]], recipe: str, temperature: float) -> list[float]:
    """Difference of own τ to SFT continued, seed by seed."""
    control = {one["seed"]: own_tau(one, temperature) for one in of_recipe(results, SFT)}
    return [own_tau(one, temperature) - control[one["seed"]] for one in of_recipe(results, recipe)]


def by_recipe(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each recipe; runs of the sweep at other rates are recipes of their own."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    chosen: dict[str, float] = {}
    for one in results:
        rate = chosen.setdefault(one["recipe"], one["rate"])
        name = one["recipe"] if one["rate"] == rate else f"{one['recipe']}, rate {one['rate']:g}"
        grouped.setdefault(name, []).append({**one, "recipe": name})
    return grouped


def table(results: list[dict[str, Any]], temperature: float) -> str:
    """Mean and spread of each recipe, and its paired difference to SFT continued, in Markdown."""
    names = [name for name in MEASURES if any(name in one["tau"] for one in results)]
    lines = [
        f"| recipe | rate | steps | seconds | runs | τ, {' | τ, '.join(names)} | paired |",
        "|---" * (6 + len(names)) + "|",
    ]
    grouped = by_recipe(results)
    for recipe, runs in grouped.items():
        cells = [recipe, f"{runs[0]['rate']:g}", str(runs[0]["steps"])]
        cells += [f"{statistics.median(one['seconds'] for one in runs):.0f}", str(len(runs))]
        cells += [
            spread([one["tau"][name] for one in runs], ".3f") if name in runs[0]["tau"] else "" for name in names
        ]
        differences = paired([*grouped[SFT], *runs], recipe, temperature)
        cells.append("" if recipe in (START, SFT) else spread(differences, "+.3f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(worlds: dict[float, dict[str, list[dict[str, Any]]]], file: Path) -> None:
    """Every run as a point, a recipe a line, a world a column; dashed: SFT continued."""
    labels = next(iter(worlds.values()))
    parts = [(temperature, label, worlds[temperature][label]) for label in labels for temperature in worlds]
    figure, axes = new_figure(len(labels), len(worlds), (7 * len(worlds), 6 * len(labels)))
    for axis, (temperature, label, results) in zip(axes, parts, strict=True):
        grouped = by_recipe(results)
        mean = {recipe: statistics.mean(own_tau(one, temperature) for one in runs) for recipe, runs in grouped.items()}
        order = sorted(grouped, key=mean.get)
        for place, recipe in enumerate(order):
            color = COLORS[3] if recipe.startswith(DEFAULT) else COLORS[1] if recipe.startswith(SFT) else COLORS[0]
            taus = [own_tau(one, temperature) for one in grouped[recipe]]
            axis.plot(taus, [place] * len(taus), "o", color=color, alpha=0.7)
        axis.axvline(mean[SFT], color=COLORS[1], linewidth=1, linestyle="--")
        title = f"Trained and verified at T = {temperature:g}, {label}"
        axis.set(yticks=range(len(order)), yticklabels=order, xlabel="τ", title=title)
    save_figure(figure, file)


def gains(
    results: list[dict[str, Any]],
    recipe: str,
    control: str,
    temperature: float,
    others: list[dict[str, Any]] | None = None,
) -> list[float]:
    """Relative gains in own τ over a control among the same results, or among `others`, for each seed of both."""
    base = {one["seed"]: own_tau(one, temperature) for one in of_recipe(others or results, control)}
    runs = [one for one in of_recipe(results, recipe) if one["seed"] in base]
    return [own_tau(one, temperature) / base[one["seed"]] - 1 for one in runs]


def gain(results: list[dict[str, Any]], recipe: str, control: str, temperature: float) -> float:
    """The mean of [`gains`] over seeds."""
    return statistics.mean(gains(results, recipe, control, temperature))


def headline(worlds: dict[float, dict[str, list[dict[str, Any]]]]) -> dict[str, float | None]:
    """Mean relative gains over SFT continued, and over the best control; paired by seed, `None` where not run."""
    found = {}
    for temperature, leading in LEADING.items():
        runs = worlds.get(temperature, {}).get("every seed", [])
        pairs = {
            "gain_t{}": (DEFAULT, SFT),
            "gain_t{}_equal_time": (DEFAULT, EQUAL_TIME),
            "auf_gain_t{}": (AUF, SFT),
            "dpace_gain_t{}": (DPACE, SFT),
            "opd_over_best_control_t{}": (DEFAULT, best_control(runs, temperature)),
        }
        if PAPER in leading:
            pairs["paper_gain_t{}"] = (PAPER, SFT)
        for name, pair in pairs.items():
            there = all(of_recipe(runs, recipe) for recipe in pair)
            found[name.format(f"{temperature:g}")] = gain(runs, *pair, temperature) if there else None
    return found


def best_control(runs: list[dict[str, Any]], temperature: float) -> str:
    """Of the controls that were run, the one of the highest mean τ; else the first."""

    def mean(recipe: str) -> float:
        taus = [own_tau(one, temperature) for one in of_recipe(runs, recipe)]
        return statistics.mean(taus) if taus else -1.0

    return max(CONTROLS[temperature], key=mean)


def main(args: StudyArguments) -> None:
    if args.quick:
        args.seeds, args.rates, args.long_steps = args.seeds[:1], [args.quick_rate], args.long_steps // 4
        args.texts, args.eval_prompts = args.texts // 2, args.eval_prompts // 2
    study = Study(args)
    worlds = run_study(study)
    tables = [
        f"Trained at T = {temperature:g}, {label}:\n\n{table(results, temperature)}"
        for temperature, parts in worlds.items()
        for label, results in parts.items()
    ]
    write_atomically(study.folder / "tables.md", "\n\n".join(tables) + "\n")
    write_atomically(study.folder / "results.json", json.dumps(worlds, indent=2))
    plot(worlds, study.folder / "recipes.png")
    print("\n\n".join(tables))
    print(json.dumps({"seeds": args.seeds, **headline(worlds)}))


if __name__ == "__main__":
    main(*HfArgumentParser(StudyArguments).parse_args_into_dataclasses())
