"""What a command answers, as a terminal shows it: tables by rich. Knows no results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table


def table(columns: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = False) -> Table:
    """
    Cells in columns.

    Args:
        columns (`Sequence[str]`): Their heads.
        lines (`Iterable[Sequence[str]]`): A cell a column.
        numbers (`bool`, *optional*, defaults to `False`): All but the first column hold numbers, set flush right.
    """
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for place, head in enumerate(columns):
        made.add_column(head, justify="right" if numbers and place else "left")
    for line in lines:
        made.add_row(*line)
    return made


def grid(lines: Iterable[Sequence[str]]) -> Table:
    """Cells in columns, without heads or lines."""
    made = Table.grid(padding=(0, 2))
    for line in lines:
        made.add_row(*line)
    return made


def as_text(*parts: RenderableType) -> str:
    """Tables and lines as standard output shows them: folded and coloured in a terminal, and in a file as they are."""
    # Commands run with stdout turned to stderr; the answer goes to the process's own.
    console = Console(file=sys.__stdout__, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as shown:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in shown.get().rstrip().splitlines())
