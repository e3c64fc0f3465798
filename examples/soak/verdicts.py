"""What becomes of a bad input: right result, clear error, unclear error, hang, or a wrong result in silence."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from draft_opd_trl.core.errors import UserError


RIGHT, CLEAR, UNCLEAR, HANG, WRONG = "right", "clear", "unclear", "hangs", "silently_wrong"
# Longer messages are cut in reports.
SHOWN = 300


@dataclass
class Input:
    """
    One bad input.

    Args:
        kind (`str`): What it is: a configuration, a folder, rows, a server's answers.
        shown (`str`): The input in words that let anyone try it again.
        act (`Callable`): Uses it; returns `None` where the result is right, else what is wrong with it.
        words (`Sequence[str]`): A clear error holds one of them: the value, or the name of a field or file.
        quick (`bool`, *optional*, defaults to `False`): It may share a process with others, and be tried again.
    """

    kind: str
    shown: str
    act: Callable[[], str | None]
    words: Sequence[str]
    quick: bool = False


@dataclass
class Verdict:
    """
    Args:
        kind (`str`): One of the five.
        what (`str`): The message, or what is wrong.
        group (`str`): Equal for inputs that most likely have one cause.
    """

    kind: str
    what: str = ""
    group: str = ""


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def verdict_of(case: Input) -> Verdict:
    """Tries an input, in this process."""
    try:
        wrong = case.act()
    except UserError as error:
        told = str(error)
        if "\n" in told or not told:
            return Verdict(UNCLEAR, told[:SHOWN], f"several lines, or none: {_place(error)}")
        if not any(word and (word in told or repr(word)[1:-1] in told) for word in case.words):
            return Verdict(UNCLEAR, told[:SHOWN], f"names neither value nor place: {_place(error)}")
        return Verdict(CLEAR, told[:SHOWN])
    except BaseException as error:
        return Verdict(UNCLEAR, f"{type(error).__name__}: {error}"[:SHOWN], _place(error))
    return Verdict(RIGHT) if wrong is None else Verdict(WRONG, wrong[:SHOWN], wrong[:60].split("=")[0])
