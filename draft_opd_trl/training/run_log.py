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
from accelerate.utils import gather_object

from ..core.stopwatch import Stopwatch


# Of these the least or the most is kept, in place of the sum.
EXTREMES = {"completions/min_length": min, "completions/max_length": max}


# A part and its whole.
Count = tuple[float | torch.Tensor, float | torch.Tensor]


def _added(some: Iterable[Mapping[str, Count]]) -> dict[str, Count]:
    """Counts by name as one; of a whole of 0 nothing was counted, and such a one has no extreme."""
    found: dict[str, list[Count]] = defaultdict(list)
    for counts in some:
        for name, count in counts.items():
            if count[1]:
                found[name].append(count)
    pairs = {name: tuple(zip(*counts, strict=True)) for name, counts in found.items()}
    return {name: (EXTREMES.get(name, sum)(parts), sum(wholes)) for name, (parts, wholes) in pairs.items()}


class RunLog:
    """
    The figures of a run.

    Args:
        accelerator ([`~accelerate.Accelerator`]): Whose ranks add up their counts.

    Attributes:
        stopwatch ([`Stopwatch`]): Takes the times of this rank. Its phase `step` is the whole step, of which `prepare`
            and `forward` are parts and the rest is the backward pass; other phases are parts of `prepare`.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.stopwatch = Stopwatch(accelerator.device)
        self._step: list[tuple[str, Count]] = []
        self._begin_window()

    def _begin_window(self) -> None:
        self._window: dict[str, Count] = {}
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    def add(self, name: str, part: float | torch.Tensor, whole: float | torch.Tensor | None = None) -> None:
        """
        Count something of this rank's share of the step.

        Args:
            name (`str`): What it is logged as; a rank need not meet what others do.
            part (`float` or `torch.Tensor`): A scalar; on a device it stays there until the step ends.
            whole (`float` or `torch.Tensor`, *optional*): What it is a part of; of 0 there is no figure. By default
                the optimizer step: the figure is then a step's sum over ranks. Such a one is counted once a step.
        """
        self._step.append((name, (part, 1 / self.accelerator.num_processes if whole is None else whole)))

    def end_step(self) -> dict[str, Count]:
        """Add up the step over all ranks, which all must call this; one wait for the device, one exchange."""
        names, counts = [name for name, _ in self._step], [count for _, count in self._step]
        values = iter(_on_host([value for count in counts for value in count]))
        own = _added({name: count} for name, count in zip(names, zip(values, values, strict=True), strict=True))
        totals = _added(gather_object([own]))
        self._window = _added([self._window, totals])
        for phase, seconds in self.stopwatch.read().items():
            self._seconds[phase] += seconds
        self._steps += 1
        self._step = []
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
