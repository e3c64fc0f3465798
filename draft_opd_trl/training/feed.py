"""Micro-steps → replay batches: which texts serve which step, and what a checkpoint must remember of that.

Holds the order of rows, the cycle (texts are written once for `steps_per_generation` micro-steps and replayed once an
optimizer step) and the global denominator. Knows no losses, no models and no logs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator

from .._trl_compat import RepeatSampler
from ..core.records import ReplayBatch, Rollout
from .batching import BatchMaker
from .replay_counts import Counts


# Of texts that an optimizer step has been through, all that is read again.
_KEPT = ("tokens", "prompt_lengths", "lengths")


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order is a function of seed and epoch, so that a resumed run finds the epoch it was in."""

    def set_epoch(self, epoch: int) -> None:
        """As called by the Trainer before each epoch, a resumed one included."""
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(epoch):
                torch.randperm(self.num_samples, generator=self.generator)


class BatchFeed:
    """
    The batches of a run, in order.

    Args:
        write (`Callable[[list[dict]], Rollout]`): Rows of a generation cycle → texts, in the order of the rows.
        batch_maker ([`BatchMaker`]): Texts of one optimizer step → its batches.
        accelerator ([`~accelerate.Accelerator`]): Adds the denominators of all ranks.
        batch_size (`int`): Texts a micro-step.
        steps_per_generation, accumulation_steps (`int`): Micro-steps a set of texts serves, and an optimizer step has.
    """

    def __init__(
        self,
        write: Callable[[list[dict]], Rollout],
        batch_maker: BatchMaker,
        accelerator: Accelerator,
        batch_size: int,
        steps_per_generation: int,
        accumulation_steps: int,
    ) -> None:
        self.write, self.batch_maker, self.accelerator = write, batch_maker, accelerator
        self.batch_size = batch_size
        self.steps_per_generation, self.accumulation_steps = steps_per_generation, accumulation_steps
        self.micro_steps = 0
        self.rollouts: list[Rollout] = []
        self._batches: list[ReplayBatch] = []

    def next(self, rows: list[dict], step: int, lmbda: float) -> tuple[ReplayBatch, Counts]:
        """
        The batch of the next micro-step.

        Args:
            rows (`list[dict]`): Rows of the whole generation cycle; read at its first micro-step only.
            step (`int`): Optimizer step.
            lmbda (`float`): The on-policy share of this step.

        Returns:
            The batch, its denominator global, and what an optimizer step met, counted, at its first micro-step.
        """
        micro = self.micro_steps % self.steps_per_generation
        accumulated = self.micro_steps % self.accumulation_steps
        if accumulated == 0:
            self._batches = []  # freed before the next texts and batches are made
        if micro == 0:
            self.rollouts = []
            texts = self.write(rows)
            self.rollouts = [
                texts.part(first, first + self.batch_size) for first in range(0, len(texts), self.batch_size)
            ]
            del texts  # the states that verification left with them, which the parts hold a copy of
        counts: Counts = {}
        if accumulated == 0:
            served = self.rollouts[micro : micro + self.accumulation_steps]
            self._batches, counts = self.batch_maker(served, step, lmbda, fresh=micro == 0)
            self._share_denominator()
            # Later steps replay with a drafter that has moved on: of the texts they keep, token ids are all they read.
            self.rollouts = [replace(rollout, blocks=None, block_states=None) for rollout in self.rollouts]
        self.micro_steps += 1
        return self._batches[accumulated], counts

    def _share_denominator(self) -> None:
        weight = self.accelerator.reduce(sum(batch.denominator for batch in self._batches), reduction="sum")
        for batch in self._batches:
            # DDP averages gradients over ranks, so each rank divides by its share of the global weight.
            batch.denominator = weight / self.accelerator.num_processes

    def state_dict(self) -> dict:
        """What a run continues with, at the end of an optimizer step, as tensors and numbers; texts on the CPU."""
        return {
            "micro_steps": self.micro_steps,
            "rollouts": [{name: getattr(rollout, name).cpu() for name in _KEPT} for rollout in self.rollouts],
        }

    def load_state_dict(self, state: dict) -> None:
        self.micro_steps = state["micro_steps"]
        self.rollouts = [Rollout(**texts).to(self.accelerator.device) for texts in state["rollouts"]]
        self._batches = []
