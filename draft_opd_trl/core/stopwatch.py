"""Seconds by phase, of the device that does the work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """
    Adds up the time that phases take.

    On CUDA a phase lasts until the device has done what it was given, not until Python has handed it over; events say
    so, and nothing waits for the measurement.

    Args:
        device (`torch.device`): Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of a `with` block to a phase; blocks may be nested."""
        if self._on_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((phase, begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def timed(self, phase: str, function: Callable) -> Callable:
        """`function`, each call of which adds to a phase."""

        def call(*args, **kwargs):
            with self.measure(phase):
                return function(*args, **kwargs)

        return call

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading; waits for the device to come to the end of the last one."""
        for phase, begin, end in self._events:
            end.synchronize()
            self._seconds[phase] += begin.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, defaultdict(float), []
        return seconds
