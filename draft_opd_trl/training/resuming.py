"""The side of a trainer that faces interruptions: checkpoints that are whole, and runs that go on from them."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..core.errors import Interrupted, UserError
from ..core.files import writing
from ..evaluation.before_after import BeforeAfter
from ..folders.run_state import (
    ASIDE,
    TRAINER_STATE,
    first_checkpoint,
    load_state,
    no_code,
    publish,
    rotate,
    save_state,
    write_manifest,
)
from ..texts.sources import CachedSource, RolloutSource
from .config import DraftOPDConfig
from .error_buffer import ErrorBuffer
from .feed import BatchFeed
from .hub_trainer import RECIPE, HubTrainer
from .interrupts import StopSignals
from .run_log import RunLog


Found = TypeVar("Found")


def settings_of(args: DraftOPDConfig) -> dict[str, Any]:
    """What tells a run from another in the same folder: no paths, no tokens, no text."""
    settings = args.to_dict()
    names = {*RECIPE, "max_steps", "num_train_epochs"} & settings.keys() - {"chat_template_kwargs"}
    return {name: settings[name] for name in sorted(names)} | {"world_size": args.world_size}


def where_to_start(args: DraftOPDConfig, resume: str | bool | None = None) -> Path | None:
    """
    [`first_checkpoint`] of a run, looked for by the first process and told to all.

    Args:
        args ([`DraftOPDConfig`]): Its `resume_from_checkpoint` counts where `resume` is `None`.
        resume (`str` or `bool`, *optional*): As given to [`~transformers.Trainer.train`].
    """
    resume = args.resume_from_checkpoint if resume is None else resume
    return on_first(lambda: first_checkpoint(resume, args.output_dir, settings_of(args)))


def on_first(find: Callable[[], Found]) -> Found:
    """What the first process finds, on all of them; and its error, as the others would wait for ever."""
    told: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            told[0] = find()
        except UserError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


class ResumingTrainer(HubTrainer):
    """
    A Trainer whose checkpoints appear whole or not at all, and whose runs go on as if they had not been interrupted.

    transformers' Trainer writes a checkpoint file by file under its own name, and takes the last one by name for a
    whole one. Here it writes into `_saving/`, and what it finds by name there, to push or to delete, is left to us.
    """

    feed: BatchFeed
    error_buffer: ErrorBuffer
    measured: BeforeAfter
    run_log: RunLog
    source: RolloutSource
    _aside: Path | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        [`~transformers.Trainer.train`], which Ctrl-C and SIGTERM end with a checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the newest whole one in `output_dir`; `args.resume_from_checkpoint` by
                default.
            args, kwargs: As in [`~transformers.Trainer.train`].

        Raises:
            `ValueError`, `FileNotFoundError`: No run can go on from there.
            `FileExistsError`: `output_dir` holds checkpoints, and this is a new run.
            `KeyboardInterrupt`: A signal ended it. A checkpoint stands, and the message says how to go on.
        """
        checkpoint = where_to_start(self.args, resume_from_checkpoint)
        self._before_training()
        with StopSignals(self._any_signal, self.is_world_process_zero()) as stop:
            self.add_callback(stop)
            try:
                output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            finally:
                self.remove_callback(stop)
        if stop.number:
            raise Interrupted(
                f"stopped by {signal.Signals(stop.number).name} at step {self.state.global_step} of "
                f"{self.state.max_steps}, with a checkpoint in {self.args.output_dir}. Go on with "
                "resume_from_checkpoint=True, or --resume_from_checkpoint on the command line.",
                128 + stop.number,
            )
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer asks whether a run is at its end only after a step, and would take one more of a finished run.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _before_training(self) -> None:
        """Called once it is known where to start."""

    def _any_signal(self, number: int) -> int:
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _remembering(self) -> dict[str, Any]:
        """What holds more of a run than its settings say, by name."""
        cached = {"source": self.source} if isinstance(self.source, CachedSource) else {}
        rooms = {"feed": self.feed, "error_buffer": self.error_buffer, **cached}
        return {**rooms, "measured": self.measured, "run_log": self.run_log}

    # -- saving ---------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # Inside a checkpoint it is the checkpoint that could not be written.
        with nullcontext() if self._aside else writing(output_dir or self.args.output_dir):
            super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        kept = "Earlier checkpoints are whole: free some space, and go on with resume_from_checkpoint=True."
        with writing(folder, kept), self._saving_aside(folder.parent) as aside:
            part = aside / folder.name
            state = {name: room.state_dict() for name, room in self._remembering().items()}
            save_state(part, self.accelerator.process_index, state)
            self.create_model_card()
            super()._save_checkpoint(model, trial)
            self._name_best(part, folder.parent)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(part, self.state.global_step, settings_of(self.args))
                publish(part, folder)
                best = self.state.best_model_checkpoint
                rotate(folder.parent, self.args.save_total_limit, {folder, *([Path(best)] if best else [])})
            self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    @contextmanager
    def _saving_aside(self, run_dir: Path) -> Iterator[Path]:
        """Inside, the Trainer's checkpoints go to the folder given. After an error nothing is left."""
        aside = run_dir / ASIDE
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            yield aside
        finally:
            self._aside = None
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)

    def _name_best(self, part: Path, run_dir: Path) -> None:
        """The best checkpoint by the name it will have, which the Trainer looked for aside."""
        step = self.state.best_global_step
        best = run_dir / f"checkpoint-{step}"
        if step and (best.name == part.name or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(part / TRAINER_STATE))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # else it has no name yet
            super()._push_from_checkpoint(checkpoint_folder)

    # -- loading --------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with no_code(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        # Of all that the Trainer loads, this is what it loads under every backend.
        with no_code(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        state = load_state(checkpoint, self.accelerator.process_index, self.accelerator.num_processes)
        for name, room in self._remembering().items():
            room.load_state_dict(state[name])

    def _load_scaler(self, checkpoint: str) -> None:
        with no_code(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str) -> None:
        with no_code(checkpoint):
            super()._load_rng_state(checkpoint)
