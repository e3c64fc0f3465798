"""Ctrl-C and SIGTERM in a run: it stops at the end of a step, with a checkpoint. Knows signals, and no files."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class StopSignals(TrainerCallback):
    """
    A context that notes SIGINT and SIGTERM, and a callback that then ends training with a checkpoint.

    Only the main thread is told of signals; in another one nothing changes. A second signal does what it did before.

    Args:
        agree (`Callable[[int], int]`): This process's signal (0: none) → one that any process had, as all must stop at
            the same step.
        speaks (`bool`): Say so, once.
    """

    def __init__(self, agree: Callable[[int], int], speaks: bool) -> None:
        self.agree, self.speaks = agree, speaks
        self.number = 0
        self._before: dict[int, Any] = {}
        self._noted = 0

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # What is ignored, as a shell does for what runs in the background, stays so.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._noted:
            self.__exit__()
            signal.raise_signal(number)
            return
        self._noted = number
        if self.speaks:
            name = signal.Signals(number).name
            told = f"\n{name}: stopping at the end of this step, with a checkpoint. Once more stops at once.\n"
            os.write(2, told.encode())  # `print` may have been interrupted, and cannot be entered twice.

    def on_step_end(self, args, state, control, **kwargs):
        self.number = self.agree(self._noted)
        if self.number:
            control.should_save = control.should_training_stop = True
        return control
