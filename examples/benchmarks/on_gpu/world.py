"""From a drafter to a given acceptance length, end to end, on a world laid out as `examples/pocket` is."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer
from draft_opd_trl.core.errors import NotFoundError

from .planted import Size


class _UntilTau(TrainerCallback):
    """Notes τ by seconds of training, evaluation left out, and ends the run where it has grown by `gain`."""

    def __init__(self, gain: float) -> None:
        self.gain, self.curve, self.evaluating = gain, [], 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluating += metrics["eval_runtime"]
        seconds = time.perf_counter() - self.began - self.evaluating
        self.curve.append({"step": state.global_step, "seconds": seconds, "tau": metrics["eval_acceptance_length"]})
        control.should_training_stop |= self.reached is not None
        return control

    @property
    def goal(self) -> float:
        return self.curve[0]["tau"] * (1 + self.gain)

    @property
    def reached(self) -> float | None:
        """Seconds to the goal."""
        return next((point["seconds"] for point in self.curve if point["tau"] >= self.goal), None)


def measure_world(size: Size, device: torch.device, folder: str, gain: float) -> Iterator[tuple[str, Any]]:
    """Draft-OPD with the default settings, on texts that are written as it goes; the trainer chooses the `device`."""
    world = Path(folder)
    drafters = sorted(world.glob("drafter-*"))
    if not drafters or not (world / "target").is_dir():
        raise NotFoundError(f"{folder} holds no target/ or no drafter-*/. Give a folder laid out as examples/pocket.")
    # The narrow one of the pocket world has room; another world has what it has.
    drafter = next((path for path in drafters if path.name.endswith("-narrow")), drafters[0])
    rows = {
        name: load_dataset("json", data_files=str(world / "prompts" / f"{name}.jsonl"), split="train")
        for name in ("quickstart", "heldout")
    }
    watch = _UntilTau(gain)
    with tempfile.TemporaryDirectory() as output:
        args = DraftOPDConfig(
            output,
            max_steps=size.world_steps,
            per_device_train_batch_size=8,
            max_completion_length=size.world_tokens,
            rollout_batch_size=64,
            eval_strategy="steps",
            eval_steps=max(size.world_steps // 16, 1),
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        held_out = rows["heldout"].select(range(size.world_prompts))
        trainer = DraftOPDTrainer(
            str(drafter), str(world / "target"), args, rows["quickstart"], held_out, callbacks=[watch]
        )
        trainer.train()
    yield "drafter", drafter.name
    yield "curve", watch.curve
    yield "goal", watch.goal
    yield "seconds_to_goal", watch.reached
