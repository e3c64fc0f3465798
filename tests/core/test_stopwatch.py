"""Seconds by phase: of the clock on a CPU, of the device's own time line on CUDA."""

import time

import torch

from draft_opd_trl.core.stopwatch import Stopwatch


def test_phases_add_up_and_one_inside_another_counts_in_both():
    stopwatch = Stopwatch(torch.device("cpu"))
    with stopwatch.measure("step"):
        for _ in range(2):
            stopwatch.timed("forward", lambda: time.sleep(0.02))()
    seconds = stopwatch.read()
    assert 0.04 <= seconds["forward"] <= seconds["step"]
    assert stopwatch.read() == {}


def test_on_cuda_a_phase_lasts_until_the_device_is_done(monkeypatch):
    """Events on the device's own time line, where work ends 5 s after Python has handed it over."""
    waited, clock = [], iter(range(0, 100, 5))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch(torch.device("cuda"))
    with stopwatch.measure("step"):
        stopwatch.timed("forward", lambda: None)()
    assert waited == []
    assert stopwatch.read() == {"forward": 5.0, "step": 15.0}
    assert waited == [10, 15] and stopwatch.read() == {}
