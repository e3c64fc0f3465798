"""Runs of training stopped by SIGKILL or by a full disk, resumed by `resume_from_checkpoint=True`, bit for bit.

An uninterrupted run of each kind is the reference. Every other run is stopped at a random instant: uniform over the
run's time, or at a random file operation and up to 3 ms after it. A run may be killed again while it resumes.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset, disable_progress_bars
from forked import Died, forked
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import logging
from world import folder_of, world

import draft_opd_trl.training.trainer
from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer, SpeculationSettings, speculate
from draft_opd_trl.core.errors import UserError


KILLS = 100
FULL_DISKS = 30
# Seconds after which a child is taken for hung: a run takes some four.
PATIENCE = 120.0
# What a log may have otherwise after a kill: clocks, texts found on disk, and the Trainer's last summary, which covers
# only the part after the resume.
UNSTEADY = ("time", "runtime", "per_second", "rollout/cached")
STEPS = 20
COMMON = {
    "max_steps": STEPS,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "max_completion_length": 16,
    "num_anchors": 8,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class Kind:
    """One kind of run."""

    drafter: str
    options: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False


KINDS = {
    "dflash": Kind("dflash"),
    "eagle3, SFT": Kind("eagle3", {"lmbda": 0.0, "temperature": 1.0}),
    "eagle3, mixed, both streams, buffer by loss": Kind(
        "eagle3",
        {
            "lmbda": 0.5,
            "rejected_weight": 0.5,
            "replay_buffer_size": 8,
            "replay_ratio": 0.5,
            "replay_by_loss": True,
            "save_total_limit": 2,
        },
    ),
    "dflash, adapter": Kind("dflash", {"save_total_limit": 1}, adapter=True),
    "dflash, drawn text, λ falling, buffer": Kind(
        "dflash", {"temperature": 0.8, "lmbda_end": 0.0, "replay_buffer_size": 8, "replay_ratio": 0.5}
    ),
    "eagle3, texts of the data set": Kind("eagle3", {"rollout_source": "dataset", "lmbda": 0.5}),
    "dflash-narrow, accumulated, adapter": Kind(
        "dflash-narrow", {"gradient_accumulation_steps": 2, "steps_per_generation": 4}, adapter=True
    ),
    "eagle3, drawn text, drawn proposals": Kind("eagle3", {"temperature": 0.7, "sample_proposals": True}),
    "dflash, drawn text, rejected stream": Kind("dflash", {"temperature": 0.8, "rejected_weight": 0.5}),
}


@dataclass
class Case:
    """
    A run to stop.

    Args:
        seed (`int`): Of everything drawn for it.
        kind (`str`): Of [`KINDS`].
        way (`str`): `"time"` or `"save"` for a kill, `"limit"` or `"full"` for a disk.
    """

    seed: int
    kind: str
    way: str


class _Operations:
    """Counts the file operations of this process inside a folder, and acts at one of them."""

    def __init__(self, folder: Path, at: int | None, act: Callable[[], None]) -> None:
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0
        self.full = False
        sys.addaudithook(self._hear)
        for module, name in ((os, "fsync"), (torch, "save"), (safetensors.torch, "serialize_file")):
            setattr(module, name, self._around(getattr(module, name)))

    def _step(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.act()

    def _refuse(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _around(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._step()
            self._refuse()
            result = function(*args, **kwargs)
            self._step()
            return result

        return call

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        if not isinstance(arguments[0], str | os.PathLike) or not os.fspath(arguments[0]).startswith(self.folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        self._step()
        if event in ("open", "os.mkdir"):
            self._refuse()


class _Notes(TrainerCallback):
    """Tells those outside how far a run came, each line at once."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def _note(self, word: str, step: int) -> None:
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{word} {step}\n".encode())
        os.close(handle)

    def on_train_begin(self, args, state, control, **kwargs):
        self._note("begun", state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self._note("saved", state.global_step)


def _noted(file: Path, word: str) -> list[int]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [int(line.split()[1]) for line in lines if line.startswith(word)]


def _trainer(kind: Kind, folder: Path, notes: Path) -> DraftOPDTrainer:
    rows = {"prompt_ids": world().prompts[:24]}
    if kind.options.get("rollout_source") == "dataset":
        settings = SpeculationSettings(16, world().stops, batch_size=24)
        rows["completion_ids"] = speculate(world().target, None, rows["prompt_ids"], settings).completions()
    return DraftOPDTrainer(
        folder_of(kind.drafter),
        world().model,
        DraftOPDConfig(str(folder), **{**COMMON, **kind.options}),
        train_dataset=Dataset.from_dict(rows),
        processing_class=world().tokenizer,
        callbacks=[_Notes(notes)],
        peft_config=LoraConfig(r=2, target_modules="all-linear") if kind.adapter else None,
    )


def _digest(value: Any) -> str:
    digest = hashlib.sha256()

    def read(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous()
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.flatten().view(torch.uint8).numpy())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                digest.update(str(key).encode())
                read(part[key])
        elif isinstance(part, list | tuple):
            for entry in part:
                read(entry)
        else:
            digest.update(repr(part).encode())

    read(value)
    return digest.hexdigest()[:16]


def _result(trainer: DraftOPDTrainer, folder: Path) -> dict[str, str]:
    """What two equal runs have equal: in memory, in the logs, and in the last checkpoint as it lies on disk."""
    logs = [
        {name: value for name, value in log.items() if not any(word in name for word in UNSTEADY)}
        for log in trainer.state.log_history
        if "train_runtime" not in log
    ]
    saved = sorted((folder / f"checkpoint-{STEPS}").glob("*.safetensors"))
    return {
        "weights": _digest(dict(trainer.model.named_parameters())),
        "optimizer": _digest(trainer.optimizer.state_dict()),
        "schedule": _digest(trainer.lr_scheduler.state_dict()),
        "logs": _digest(logs),
        "saved weights": _digest({file.name: file.read_bytes() for file in saved}),
    }


def _train(kind: Kind, folder: Path, resume: bool, at: int | None, way: str, signal_to: int, draws: Random) -> None:
    """A whole run in this process, whose outcome goes to `<folder>.json`. Does not return where it is killed."""
    notes, outcome = folder.with_suffix(".notes"), folder.with_suffix(".json")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bars()
    # Half of such a short run would be its memory plan, which saves nothing: the instants shall fall into the rest.
    draft_opd_trl.training.trainer.announce_plan = lambda *args, **kwargs: None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def act() -> None:
        if way == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (draws.randrange(100_000), hard))
        elif way == "full":
            operations.full = True
        elif draws.random() < 0.5:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.write(signal_to, b"!")

    told: dict[str, Any] = {}
    try:
        trainer = _trainer(kind, folder, notes)
        operations = _Operations(folder, at, act)
        try:
            trainer.train(resume_from_checkpoint=resume or None)
        except (UserError, ValueError):
            # Killed before anything was saved: there is nothing to resume from, and the same command starts the run.
            if not resume or _noted(notes, "saved"):
                raise
            trainer = _trainer(kind, folder, notes)
            trainer.train()
        told = {"result": _result(trainer, folder), "operations": operations.count}
    except Exception as error:
        told = {
            "error": f"{type(error).__name__}: {error}",
            "clear": isinstance(error, UserError) and "\n" not in str(error),
            "where": traceback.format_exc().strip().splitlines()[-3:],
        }
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    outcome.write_text(json.dumps(told))


def _run(
    kind: Kind,
    folder: Path,
    resume: bool,
    draws: Random,
    at: int | None = None,
    way: str = "",
    after: float = PATIENCE,
) -> tuple[bool, dict[str, Any]]:
    """A run in a child; whether it was killed, and what it told."""
    outcome = folder.with_suffix(".json")
    outcome.unlink(missing_ok=True)
    hear, signal_to = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hear)
        try:
            _train(kind, folder, resume, at, way, signal_to, draws)
        finally:
            os._exit(0)
    os.close(signal_to)
    # Readable when the run has come to the operation it is to be killed after, and when it has ended.
    heard = select.select([hear], [], [], after)[0] and os.read(hear, 1)
    if heard:
        time.sleep(draws.uniform(0, 0.003))
    if heard or heard == []:
        os.kill(pid, signal.SIGKILL)
    os.close(hear)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and heard == [] and after == PATIENCE:
        return False, {"error": f"no end after {PATIENCE:.0f} s", "clear": False}
    return os.WIFSIGNALED(status), json.loads(outcome.read_text()) if outcome.is_file() else {}


def _uninterrupted(kind: str, scratch: str) -> dict[str, Any]:
    folder = Path(scratch, f"reference-{list(KINDS).index(kind)}")
    start = time.monotonic()
    _, told = _run(KINDS[kind], folder, False, Random(0))
    shutil.rmtree(folder, ignore_errors=True)
    return {**told, "seconds": time.monotonic() - start}


def _stop_and_resume(case: Case, references: dict[str, dict], scratch: str) -> dict[str, Any]:
    """One case; `kills` of it, and in words why its end is not the reference's."""
    draws, kind, reference = Random(case.seed), KINDS[case.kind], references[case.kind]
    folder = Path(scratch, f"run-{case.seed}")
    notes = folder.with_suffix(".notes")
    kills, stopped, told = 0, {}, {}
    disk = case.way in ("limit", "full")
    for attempt in itertools.count():
        at = draws.randint(1, reference["operations"]) if case.way != "time" else None
        after = draws.uniform(0.02, reference["seconds"]) if case.way == "time" else PATIENCE
        killed, told = _run(kind, folder, attempt > 0 and folder.exists(), draws, at, case.way, after)
        kills += killed
        if disk:
            stopped = told
        if disk or "error" in told or kills == 3 or (killed and draws.random() < 0.7):
            break
        if not killed and kills:  # it had come to its end before the second kill
            break
        if not killed:
            shutil.rmtree(folder, ignore_errors=True)
            notes.unlink(missing_ok=True)
    kept = max(_noted(notes, "saved"), default=0)
    if "error" not in told or disk:
        _, told = _run(kind, folder, folder.exists(), draws)
    begun = _noted(notes, "begun")
    why = told.get("error", "")
    if not why and begun and begun[-1] < kept and told.get("result"):
        why = f"step {kept} had been saved, and it went on from {begun[-1]}"
    if not why:
        result = told.get("result", {})
        why = ", ".join(name for name, value in reference["result"].items() if result.get(name) != value)
        why = why and f"differs in {why}"
    shutil.rmtree(folder, ignore_errors=True)
    for file in (notes, folder.with_suffix(".json")):
        file.unlink(missing_ok=True)
    return {"kills": kills, "why": why, "stopped": stopped, "kept": kept}


def _cases(seed: int, ways: tuple[str, str]) -> Iterator[Case]:
    draws = Random(seed)
    for kind in itertools.cycle(KINDS):
        yield Case(draws.randrange(2**32), kind, draws.choice(ways))


def run(
    seconds: float, report: Callable[[str], None], seed: int = 0, scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """
    Stop runs and resume them.

    Args:
        seconds (`float`): After which nothing more is begun.
        report (`Callable`): Takes a line of text.
        seed (`int`, *optional*, defaults to `0`): Of all that is drawn.
        scale (`float`, *optional*, defaults to `1.0`): Share of the 100 kills and 30 full disks.
        workers (`int`, *optional*, defaults to `2`): Processes at once.

    Returns:
        `kills` and of these `kills_equal`; `disk_full` and of these `disk_full_equal` and `disk_full_unclear`.
    """
    start = time.monotonic()
    world()
    wanted = {"kills": max(round(KILLS * scale), 1), "disk_full": max(round(FULL_DISKS * scale), 1)}
    counts = Counter(kills=0, kills_equal=0, disk_full=0, disk_full_equal=0, disk_full_unclear=0)
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        kinds = list(KINDS)[: wanted["kills"]]
        references = dict(forked(partial(_uninterrupted, scratch=scratch), kinds, start + seconds, workers, PATIENCE))
        broken = [kind for kind, told in references.items() if isinstance(told, Died) or "result" not in told]
        if broken:
            raise RuntimeError(f"{broken[0]}: the uninterrupted run failed: {references[broken[0]]}")
        if not references:
            return dict(counts)
        slowest = max(told["seconds"] for told in references.values())
        report(f"{len(references)} kinds of run, {STEPS} steps each, {slowest:.1f} s at most")
        function = partial(_stop_and_resume, references=references, scratch=scratch)
        for name, ways, until in (
            ("kills", ("time", "save"), start + 0.8 * seconds),
            ("disk_full", ("limit", "full"), start + seconds),
        ):
            cases = (case for case in _cases(seed, ways) if case.kind in references)
            with tqdm(total=wanted[name], desc=name, unit="stop") as bar:
                for case, told in forked(function, cases, until, workers, 5 * PATIENCE):
                    if isinstance(told, Died):
                        told = {"kills": 1, "why": str(told), "stopped": {}, "kept": 0}
                    stops = told["kills"] if name == "kills" else 1
                    counts[name] += stops
                    counts[f"{name}_equal"] += 0 if told["why"] else stops
                    bar.update(stops)
                    if told["why"]:
                        report(f"{name}, {case.kind}, {case.way}, seed {case.seed}: {told['why']}")
                    if told["stopped"].get("error") and not told["stopped"]["clear"]:
                        counts["disk_full_unclear"] += 1
                        report(f"{name}, {case.kind}, {case.way}, seed {case.seed}: {told['stopped']['error']}")
                    if counts[name] >= wanted[name]:
                        break
    return dict(counts)
