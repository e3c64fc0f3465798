"""A process for each case, so that a case that hangs, dies or bends global state harms no other.

The parent has imported everything and has run no torch operation in parallel, so a child is ready in some 40 ms.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn


_END = object()


class Died(str):
    """What ended a case from outside, instead of its result."""


HANG = Died("hang")


class HarnessError(RuntimeError):
    """A case failed in a way that only a fault of this harness explains."""


def _child(function: Callable[[Any], Any], case: Any, sender: Connection, memory: int | None) -> NoReturn:
    os.setpgid(0, 0)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    if memory is not None:
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, resource.RLIM_INFINITY))
    try:
        outcome = function(case)
    except BaseException:
        outcome = HarnessError(traceback.format_exc())
    sender.send(outcome)
    os._exit(0)


def _reap(pid: int, kill: bool) -> Died:
    if kill:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return HANG if kill else Died(f"died with {signal.Signals(os.WTERMSIG(status)).name}" if status else "vanished")


def forked(
    function: Callable[[Any], Any],
    cases: Iterable[Any],
    until: float,
    at_once: int = 2,
    limit: float = 10.0,
    memory: int | None = None,
) -> Iterator[tuple[Any, Any]]:
    """
    Run `function(case)` of each case in a process of its own.

    Args:
        function (`Callable`): Returns what pickle can hold.
        cases (`Iterable`): Drawn one by one.
        until (`float`): `time.monotonic()` after which no further case is begun.
        at_once (`int`, *optional*, defaults to `2`): Processes.
        limit (`float`, *optional*, defaults to `10.0`): Seconds of a case.
        memory (`int`, *optional*): Bytes a case may take beyond what the parent has (Linux alone).

    Yields:
        The case and what it returned, in any order; [`Died`] instead where the process was killed or died.

    Raises:
        `HarnessError`: `function` raised, which it must not.
    """
    memory = memory if os.path.exists("/proc/self/statm") else None
    running: dict[Connection, tuple[Any, int, float]] = {}
    cases = iter(cases)
    try:
        while True:
            while len(running) < at_once and time.monotonic() < until and (case := next(cases, _END)) is not _END:
                receiver, sender = multiprocessing.Pipe(duplex=False)
                pid = os.fork()
                if pid == 0:
                    _child(function, case, sender, memory)
                sender.close()
                running[receiver] = (case, pid, time.monotonic() + limit)
            if not running:
                return
            nearest = min(deadline for _, _, deadline in running.values())
            ended = wait(list(running), max(nearest - time.monotonic(), 0))
            late = [r for r, (_, _, deadline) in running.items() if r not in ended and deadline <= time.monotonic()]
            for receiver in itertools.chain(ended, late):
                case, pid, _ = running[receiver]
                try:
                    outcome = HANG if receiver in late else receiver.recv()
                except EOFError:
                    outcome = None
                died = _reap(pid, kill=receiver in late)
                del running[receiver]
                receiver.close()
                if isinstance(outcome, HarnessError):
                    raise HarnessError(f"{case}\n{outcome}")
                yield case, died if outcome is None else outcome
    finally:
        for receiver, (_, pid, _) in running.items():
            _reap(pid, kill=True)
            receiver.close()
