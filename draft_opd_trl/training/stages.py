"""SFT before Draft-OPD, as one run: what that stage is set to, where an interrupted run goes on, what was measured.

The stage is a run of its own in a folder of its own, which reads the same texts. Knows no command line and no losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers.utils import logging

from ..core.errors import ExistsError, InputError
from ..core.files import write_atomically
from ..decoding.acceptance import AcceptanceReport
from ..evaluation.before_after import Measured
from ..folders.run_state import checkpoints_in, differing, first_checkpoint, settle
from ..texts.sources import CachedSource
from .config import DraftOPDConfig
from .loading import generation_batch_size
from .optim import peak_rate
from .resuming import on_first, settings_of
from .rollout import text_folder
from .trainer import DraftOPDTrainer


logger = logging.get_logger(__name__)

FOLDER = "sft"
DONE = "stage.json"  # Says that the stage is finished, and what was measured of it.


def sft_config(args: DraftOPDConfig, steps: int, epochs: float, learning_rate: float | None) -> DraftOPDConfig:
    """
    The settings of an SFT stage before a run: plain SFT on the texts that the run reads too.

    Args:
        args ([`DraftOPDConfig`]): Of the run.
        steps (`int`), epochs (`float`): Its length; one of them is 0.
        learning_rate (`float`, *optional*): Its peak; by default one for a drafter that has learnt nothing yet.
    """
    length = {"max_steps": steps} if steps else {"max_steps": -1, "num_train_epochs": epochs}
    if learning_rate is None:
        learning_rate = peak_rate(args.optim, args.sampling.greedy, new=True)
    return replace(
        args,
        output_dir=str(Path(args.output_dir) / FOLDER),
        text_cache_dir=str(text_folder(args)),
        # A drafter that knows nothing only slows the target down.
        rollout_source="generate" if args.rollout_source == "speculation" else args.rollout_source,
        learning_rate=learning_rate,
        lmbda=0.0,
        lmbda_end=None,
        anchors="exposed",
        replay_buffer_size=0,
        replay_ratio=0.0,
        replay_by_loss=False,
        # Those of SFT, whatever the run's own.
        accepted_loss=None,
        accepted_weight=1.0,
        rejected_loss=None,
        rejected_weight=0.0,
        loss_max_clamp=None,
        push_to_hub=False,
        resume_from_checkpoint=None,
        **length,
    )


# -- where to start ---------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """
    Where a run begins.

    Args:
        done (`dict`, *optional*): What a finished SFT stage left behind.
        sft, opd (`Path`, *optional*): Checkpoints that the stages go on from.
    """

    done: dict[str, Any] | None = None
    sft: Path | None = None
    opd: Path | None = None


def where_stages_start(args: DraftOPDConfig, sft: DraftOPDConfig) -> Start:
    """
    Where a run of two stages begins, found by the first process and told to all.

    Resumed, it goes on with the stage that it was in, and begins where nothing was saved yet.

    Raises:
        `FileExistsError`: A new run would mix with another's.
        `FileNotFoundError` or `ValueError`: `resume_from_checkpoint` names what no run goes on from.
    """
    return on_first(lambda: _where_to_start(args, sft))


def _where_to_start(args: DraftOPDConfig, sft: DraftOPDConfig) -> Start:
    resume, done = str(args.resume_from_checkpoint).lower(), _read_done(Path(sft.output_dir))
    if resume in ("none", "false", ""):
        if done is not None:
            raise ExistsError(
                f"{sft.output_dir} holds the finished SFT stage of an earlier run. Go on with that run "
                "(--resume_from_checkpoint), give another output_dir, or delete the folder."
            )
        return Start(None, _first(False, sft), _first(False, args))
    named = True if resume == "true" else str(args.resume_from_checkpoint)
    in_sft = named is not True and Path(named).resolve().parent == Path(sft.output_dir).resolve()
    if done is None:
        if checkpoints_in(args.output_dir) or (named is not True and not in_sft):
            raise InputError(
                f"resume_from_checkpoint is {named!r}, but {sft.output_dir} holds no finished SFT stage that "
                "Draft-OPD could have begun from. Leave the sft options out to go on with a run that had none, or "
                "give another output_dir."
            )
        return Start(sft=_first(named, sft))
    if in_sft:
        raise InputError(
            f"resume_from_checkpoint is {named!r}, but the SFT stage in {sft.output_dir} is finished. Go on with "
            "Draft-OPD (bare --resume_from_checkpoint), or give another output_dir."
        )
    if told := differing(done["settings"], settings_of(sft)):
        logger.warning_once(f"The SFT stage in {sft.output_dir} is finished, with other settings: {told}.")
    return Start(done, None, _first(named, args))


def _first(resume: str | bool, args: DraftOPDConfig) -> Path | None:
    """[`first_checkpoint`], which is none where a stage was cut off before its first."""
    settle(args.output_dir)
    if resume is True and not checkpoints_in(args.output_dir):
        return None
    return first_checkpoint(resume, args.output_dir, settings_of(args))


def _read_done(folder: Path) -> dict[str, Any] | None:
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        return done if isinstance(done["settings"], dict) and isinstance(done["measured"], dict) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


# -- the stages -------------------------------------------------------------------------------------------------------


def run_stage(trainer: DraftOPDTrainer, checkpoint: Path | None, known: Measured | None = None) -> dict[str, float]:
    """
    Evaluate, train, save and evaluate again.

    Args:
        trainer ([`DraftOPDTrainer`]): It evaluates if it has an evaluation data set.
        checkpoint (`Path`, *optional*): Where training goes on; that run remembers what was measured before it began.
        known ([`Measured`], *optional*): An evaluation of the drafter as it is now, in place of the first.

    Returns:
        Metrics of training.
    """
    evaluates = trainer.eval_dataset is not None
    if evaluates and checkpoint is None:
        if known is None:
            trainer.evaluate()
        else:
            trainer.note_evaluation(trainer.eval_dataset, known.report)
    metrics = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else False).metrics
    trainer.save_model()
    if evaluates:
        trainer.evaluate()
    return metrics


def run_sft(build: Callable[[], DraftOPDTrainer], start: Start) -> dict[str, Measured]:
    """
    The SFT stage, unless it is finished.

    Args:
        build (`Callable`): Makes its trainer, in its own folder.
        start ([`Start`]): Where the run begins.

    Returns:
        `dict`: What was measured `before` it and `last`; empty if nothing was.
    """
    if start.done is None:
        trainer = build()
        write_ahead(trainer)
        run_stage(trainer, start.sft)
        whole = {"before": trainer.measured.before, "last": trainer.measured.last}
        measured = {when: asdict(found["eval"]) for when, found in whole.items() if "eval" in found}
        start.done = {"settings": settings_of(trainer.args), "measured": measured}
        if trainer.is_world_process_zero():
            write_atomically(Path(trainer.args.output_dir) / DONE, json.dumps(start.done))
        trainer.accelerator.wait_for_everyone()
        # The next stage loads a target and a drafter of its own.
        trainer.accelerator.free_memory()
    return {
        when: Measured(kept["prompts"], AcceptanceReport(**kept["report"]))
        for when, kept in start.done["measured"].items()
    }


def write_ahead(trainer: DraftOPDTrainer) -> None:
    """
    Have the texts of a run's first epoch written before it, at full width, as far as it reads them.

    A step asks for the texts of its own batch alone, which are fewer than decoding pays for.
    """
    args, source, dataset = trainer.args, trainer.source, trainer.train_dataset
    if not isinstance(source, CachedSource):
        return
    order = list(dict.fromkeys(trainer._get_train_sampler()))
    if args.max_steps > 0:
        generations = math.ceil(args.max_steps * args.gradient_accumulation_steps / args.steps_per_generation)
        order = order[: generations * generation_batch_size(args)]
    own = order[args.process_index :: args.world_size]
    width = args.rollout_batch_size
    hidden = args.disable_tqdm or not trainer.is_world_process_zero()
    bar = tqdm(total=len(own), desc="Writing texts", unit="text", disable=hidden)
    with bar, trainer.target.uneven_forwards():
        for begin in range(0, len(own), width):
            rows = [dataset[index] for index in own[begin : begin + width]]
            source.fill(rows)
            bar.update(len(rows))
