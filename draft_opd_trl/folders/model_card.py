"""The model card of a drafter folder: what is known of a drafter and of the run that trained it in, `README.md` out.

Knows no trainer; it reads a run's history as the Trainer logs it.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, try_to_load_from_cache
from transformers.utils import logging

from ..core.files import atomic_file
from ..core.markdown import cell, code, fence, one_line, plain
from ..drafters.base import Drafter
from .serving import launch_commands, serving_faults


logger = logging.get_logger(__name__)

CITATION = """@article{draftopd2026,
  title  = {Draft-OPD},
  year   = {2026},
  note   = {arXiv:2605.29343}
}"""


TAGS = ("draft-opd", "speculative-decoding")


@dataclass
class Evaluation:
    """
    Acceptance, as a Trainer logged it once.

    Args:
        name (`str`): Of the prompts; empty for a Trainer's only evaluation set.
        step (`int`): Optimizer steps taken before.
        prompts (`int`): How many.
        acceptance_length (`float`): τ.
        by_slot (`list[float]`): Share of blocks whose first k proposals were all accepted.
        interval (`list[float]`): 95 % interval of τ; empty where none was logged.
        change (`list[float]`): τ − τ before training, paired by prompt, and its interval; empty where there is none.
        serving (`dict[int, str]`): Batch size → proposals to serve with, in words; empty where nothing was timed.
    """

    name: str
    step: int
    prompts: int
    acceptance_length: float
    by_slot: list[float]
    interval: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    serving: dict[int, str] = field(default_factory=dict)


@dataclass
class TrainingRun:
    """
    The run that trained a drafter.

    Args:
        step (`int`): Optimizer steps that these weights have seen.
        history (`list[dict]`): The Trainer's `log_history`.
        recipe (`dict`): Settings by name.
        law (`str`): How evaluation decoded, such as "temperature 0".
        tokens (`int`): Tokens of text read, prompts included.
        dataset_name (`str`, *optional*): Where the prompts came from.
    """

    step: int
    history: Sequence[dict[str, Any]]
    recipe: dict[str, Any]
    law: str
    tokens: int
    dataset_name: str | None = None

    def evaluations(self) -> list[list[Evaluation]]:
        """For each set of prompts the last evaluation before the first step, and the last one up to `step`."""
        kept: dict[str, dict[bool, Evaluation]] = {}
        for evaluation in (evaluation for log in self.history for evaluation in _read(log)):
            if evaluation.step <= self.step:
                kept.setdefault(evaluation.name, {})[evaluation.step > 0] = evaluation
        return [[pair[trained] for trained in sorted(pair)] for pair in kept.values()]


def _read(log: dict[str, Any]) -> list[Evaluation]:
    evaluations = []
    for match in filter(None, (re.fullmatch(r"(\w+)_acceptance_length", key) for key in log)):
        prefix = match[1]
        slots = (f"{prefix}_acceptance_slot_{k}" for k in itertools.count(1))
        change = f"{match[0]}_change"
        evaluations.append(
            Evaluation(
                name=prefix.removeprefix("eval").strip("_"),
                step=log["step"],
                prompts=log[f"{prefix}_prompts"],
                acceptance_length=round(log[match[0]], 4),
                by_slot=[round(log[slot], 4) for slot in itertools.takewhile(log.__contains__, slots)],
                interval=[log[key] for key in (f"{match[0]}_low", f"{match[0]}_high") if key in log],
                change=[log[key] for key in (f"{change}{end}" for end in ("", "_low", "_high")) if key in log],
                serving=_serving(log, f"{prefix}_serve_batch_"),
            )
        )
    return evaluations


def _serving(log: dict[str, Any], start: str) -> dict[int, str]:
    """Of the metrics that begin so, in words."""
    told = {}
    for size in (match[1] for match in (re.fullmatch(rf"{start}(\d+)_speedup", key) for key in log) if match):
        proposals, speedup = (log[f"{start}{size}_{name}"] for name in ("num_draft_tokens", "speedup"))
        told[int(size)] = f"K = {proposals} ({speedup:.2f} times plain)" if proposals else "no drafter"
    return told


def _eval_results(evaluation: Evaluation, law: str) -> list[EvalResult]:
    about = {
        "task_type": "text-generation",
        "task_name": "Speculative decoding",
        "dataset_type": evaluation.name or "prompts",
        "dataset_name": f"{evaluation.name or 'Evaluation'} prompts ({evaluation.prompts})",
    }
    name = f"Acceptance length τ: tokens committed per verification, {law}"
    results = [
        EvalResult(
            **about, metric_type="acceptance_length", metric_name=name, metric_value=evaluation.acceptance_length
        )
    ]
    for k, share in enumerate(evaluation.by_slot, start=1):
        name = f"Share of blocks whose first {k} proposals were all accepted, {law}"
        results.append(EvalResult(**about, metric_type=f"acceptance_slot_{k}", metric_name=name, metric_value=share))
    return results


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `namespace/name`, and no folder here is called so."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, flags=re.ASCII) is not None and not Path(name).exists()


def cached_revision(name: str, revision: str | None = None) -> str | None:
    """The commit of a model that was just loaded from the Hub; `None` if it was loaded from a folder."""
    file = try_to_load_from_cache(name, "config.json", revision=revision) if is_hub_id(name) else None
    return Path(file).parent.name if isinstance(file, str) else None


def _shown(name: str) -> str:
    """An id as it is, a path without its folders, which are this machine's alone."""
    return name if is_hub_id(name) else Path(name).name


def _link(name: str, revision: str | None = None) -> str:
    """Markdown of a model or data set, with a link if it is on the Hub."""
    if not is_hub_id(name):
        return code(_shown(name))
    return f"[`{name}`](https://huggingface.co/{name}{f'/tree/{revision}' if revision else ''})"


def _front_matter(file: Path) -> dict[str, Any]:
    """The metadata of a card, of no more than its first 64 KiB."""
    if not file.is_file():
        return {}
    with open(file, "rb") as card:
        text = card.read(2**16).decode("utf-8", errors="replace")
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, flags=re.DOTALL)
    data = yaml.safe_load(found[1]) if found else {}
    return data if isinstance(data, dict) else {}


@lru_cache
def target_licence(name: str, revision: str | None) -> dict[str, str]:
    """The licence fields of a target's own card; empty where there is none or it cannot be read."""
    try:
        file = hf_hub_download(name, "README.md", revision=revision) if is_hub_id(name) else Path(name) / "README.md"
        data = _front_matter(Path(file))
    except Exception as error:  # A card is anybody's text: whatever is wrong with it must not end a run.
        logger.warning(f"The licence of {name} is not known, as its card cannot be read ({type(error).__name__}).")
        return {}
    fields = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return {key: one_line(value)[:200] for key, value in fields.items() if isinstance(value, str) and value.strip()}


def _without_password(value: Any) -> Any:
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", value) if isinstance(value, str) else value


def _setting(value: Any) -> str:
    """A setting in words, without what may be a secret or is no plain value."""
    if isinstance(value, dict):
        hidden = re.compile("auth|key|password|secret|token", flags=re.IGNORECASE)
        shown = {
            name: _without_password(one) if isinstance(one, str | bool | int | float) else "…"
            for name, one in value.items()
            if not hidden.search(str(name))
        }
        value = ", ".join(f"{name}: {one}" for name, one in shown.items())
    text = str(_without_password(value))
    return plain(text if len(text) <= 200 else f"{text[:200]}…")


def write_model_card(
    file: Path,
    model_name: str,
    drafter: Drafter,
    target_name: str | None = None,
    target_revision: str | None = None,
    tags: Sequence[str] = TAGS,
    run: TrainingRun | None = None,
    adapter: str | None = None,
) -> None:
    """
    Render `templates/model_card.md`.

    Args:
        file (`Path`): Where to; its folder is made.
        model_name (`str`): Id on the Hub, or name of the folder.
        drafter ([`Drafter`]): The drafter.
        target_name (`str`, *optional*): Id or path of its target; linked when it is an id, else named without its
            folders.
        target_revision (`str`, *optional*): Commit of the target that the drafter was trained for.
        tags (`Sequence[str]`, *optional*): Hub tags, beside the kind.
        run ([`TrainingRun`], *optional*): What trained it.
        adapter (`str`, *optional*): The method, where the folder holds an adapter on the drafter it was trained from.
    """
    licence = target_licence(target_name, target_revision) if target_name else {}
    evaluations = run.evaluations() if run is not None else []
    # The index is about these very weights, so an evaluation of an earlier step does not enter it.
    measured = [pair[-1] for pair in evaluations if pair[-1].step == run.step]
    results = [result for last in measured for result in _eval_results(last, run.law)]
    served_as = f"{model_name}-whole" if adapter else model_name
    model_type = drafter._target.config.model_type if drafter._target is not None else None
    faults = serving_faults(drafter, model_type) if model_type else []
    refusing = {engine for _, engine, served in faults if served is False}
    commands = launch_commands(drafter, _shown(target_name or "TARGET"), served_as)
    commands = {engine: command for engine, command in commands.items() if engine not in refusing}
    export = shlex.join(["draft-opd", "export", model_name, "--format", drafter.kind, "--output_dir", served_as])
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            base_model=target_name if is_hub_id(target_name or "") else None,
            datasets=[run.dataset_name] if run is not None and is_hub_id(run.dataset_name or "") else None,
            tags=sorted({drafter.kind, *tags}),
            model_name=model_name if results else None,
            eval_results=results or None,
            **licence,
        ),
        template_path=str(Path(__file__).parents[1] / "templates" / "model_card.md"),
        model_name=model_name,
        drafter=drafter,
        adapter=adapter,
        start=drafter.config._name_or_path,
        target=_link(target_name, target_revision) if target_name else "its target",
        target_revision=target_revision,
        licence=licence.get("license_name") or licence.get("license"),
        run=run,
        evaluations=evaluations,
        served_as=served_as,
        commands=commands,
        export=export,
        remarks=[told for told, _, _ in faults],
        fence=fence(export, *commands.values()),
        versions={
            name: importlib.metadata.version(name)
            for name in ("draft_opd_trl", "trl", "transformers", "torch", "datasets")
        },
        link=_link,
        setting=_setting,
        plain=plain,
        code=code,
        cell=cell,
        quoted=json.dumps,
        citation=CITATION,
    )
    with atomic_file(file) as part:
        card.save(part)
