"""What a training step counted, over ranks and over the steps of a logging window; what is logged are ratios of sums.

A figure is a part over a whole. Both are added over micro-steps, ranks and steps before one divides the other, so that
no figure depends on how a batch is laid out or on how often is logged. Knows no losses, texts or trainers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator

from .stopwatch import Stopwatch


# Every figure, so that the ranks add the same ones in the same order whatever each of them met.
FIGURES = (
    "loss/accepted",
    "loss/rejected",
    "acceptance/length",
    "replay/error_share",
    "replay/blocks",
    "replay/supervised_tokens",
    "replay/outside_vocab",
    "replay/buffer",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "rollout/cached",
    "rollout/dropped",
    "num_tokens",
)
# Of these the least or the most is kept, in place of the sum.
EXTREMES = {"completions/min_length": min, "completions/max_length": max}


Count = tuple[float | torch.Tensor, float | torch.Tensor]


def _joined(name: str, counts: Iterable[Count]) -> Count:
    """Parts and wholes of one figure as one."""
    parts, wholes = zip(*counts, strict=True)
    return EXTREMES.get(name, sum)(parts), sum(wholes)


class RunLog:
    """
    The figures of a run.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Whose ranks add up their counts.
        num_draft_tokens (`int`): K, for acceptance by slot.

    Attributes:
        stopwatch ([`Stopwatch`]): Takes the times of this rank. Its phase `step` is the whole step, of which `prepare`
            and `forward` are parts and the rest is the backward pass; other phases are parts of `prepare`.
    """

    def __init__(self, accelerator: Accelerator, num_draft_tokens: int) -> None:
        self.accelerator = accelerator
        self.stopwatch = Stopwatch(accelerator.device)
        self._names = [*FIGURES, *(f"acceptance/slot_{k}" for k in range(1, num_draft_tokens + 1))]
        self._begin_step()
        self._begin_window()

    def _begin_step(self) -> None:
        self._step: dict[str, list[Count]] = {name: [] for name in self._names}

    def _begin_window(self) -> None:
        self._window: dict[str, Count] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    def add(self, name: str, part: float | torch.Tensor, whole: float | torch.Tensor | None = None) -> None:
        """
        Count something of this rank's share of the step.

        Args:
            name (`str`): One of `FIGURES`, `acceptance/slot_<k>`, or `auxiliary/<name>` of a drafter's own loss.
            part (`float` or `torch.Tensor`): A scalar; on a device it stays there until the step ends.
            whole (`float` or `torch.Tensor`, *optional*): What it is a part of; of 0 there is no figure. By default
                the optimizer step: the figure is then a step's sum over ranks. Such a one is counted once a step.
        """
        if name.startswith("auxiliary/") and name not in self._step:
            # A drafter's own; every rank adds it in every step, in the same order.
            self._names.append(name)
            self._step[name] = []
        self._step[name].append((part, 1 / self.accelerator.num_processes if whole is None else whole))

    def end_step(self) -> dict[str, Count]:
        """Add up the step over all ranks, which all must call this; one wait for the device, one exchange."""
        counts = {name: _joined(name, found) if found else (0.0, 0.0) for name, found in self._step.items()}
        flat = _on_host([value for count in counts.values() for value in count])
        rows = [flat]
        if self.accelerator.num_processes > 1:
            row = torch.tensor([flat], dtype=torch.float64, device=self.accelerator.device)
            rows = self.accelerator.gather(row).tolist()
        totals = {}
        for place, name in enumerate(self._names):
            found = [(row[2 * place], row[2 * place + 1]) for row in rows if row[2 * place + 1]]
            if found:
                totals[name] = _joined(name, found)
                so_far = [self._window[name]] if name in self._window else []
                self._window[name] = _joined(name, [*so_far, totals[name]])
        for phase, seconds in self.stopwatch.read().items():
            self._seconds[phase] += seconds
        self._steps += 1
        self._begin_step()
        return totals

    def take(self) -> dict[str, float]:
        """The figures of the steps since the last call, and the seconds of a step, this rank's."""
        figures = {name: part if name in EXTREMES else part / whole for name, (part, whole) in self._window.items()}
        times = {phase: seconds / self._steps for phase, seconds in self._seconds.items()}
        if times:
            figures["step_time"] = times.pop("step")
            times["backward"] = figures["step_time"] - times.pop("prepare") - times["forward"]
            figures |= {f"time/{phase}": seconds for phase, seconds in times.items()}
        self._begin_window()
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The window so far, at the end of a step; numbers alone."""
        window = {name: list(count) for name, count in self._window.items()}
        return {"window": window, "seconds": dict(self._seconds), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the window that a checkpoint cut in two."""
        self._window = {name: tuple(count) for name, count in state["window"].items()}
        self._seconds = defaultdict(float, state["seconds"])
        self._steps = state["steps"]


def _on_host(values: list[float | torch.Tensor]) -> list[float]:
    """All as numbers, with one wait for the device."""
    places = [place for place, value in enumerate(values) if isinstance(value, torch.Tensor)]
    if places:
        fetched = torch.stack([values[place].detach().float() for place in places]).tolist()
        values = list(values)
        for place, number in zip(places, fetched, strict=True):
            values[place] = number
    return values
