"""How traces look: one self-contained HTML page, and the same colours in a terminal.

Knows no models; it shows what a [`Trace`] holds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from ..core.errors import InputError
from ..core.files import write_atomically
from .traces import Trace


# Okabe–Ito colours, as in templates/trace.html. The signs of `LEGEND` say the same without them.
STYLES = {
    "accepted": "#009e73",
    "rejected": "strike #d55e00",
    "recovered": "bold white on #0072b2",
    "bonus": "bold black on #cc79a7",
    "quiet": "dim",
}
LEGEND = (
    ("│", "quiet"),
    ("accepted", "accepted"),
    ("⟨rejected⟩", "rejected"),
    ("recovered", "recovered"),
    ("│", "quiet"),
    ("accepted", "accepted"),
    ("⁺bonus", "bonus"),
    ("│ a block ends", "quiet"),
)


def write_trace_page(file: str | os.PathLike, traces: Mapping[str, Sequence[Trace]], about: str = "") -> None:
    """
    Write the viewer: one HTML file that asks no network for anything.

    Args:
        file (`str` or `os.PathLike`): Where; its folder is made.
        traces (`Mapping[str, Sequence[Trace]]`): By drafter, the earlier one first, over the same texts.
        about (`str`, *optional*): What the page says of the target and its law.

    Raises:
        `ValueError`: No text, or drafters with different numbers of texts.
    """
    texts = _side_by_side(traces)
    slots = [len(block.drafts) for text in texts for trace in text for block in trace.blocks]
    data = {
        "about": about,
        "drafters": list(traces),
        "num_draft_tokens": max(slots, default=1),
        "texts": [[_rounded(asdict(trace)) for trace in text] for text in texts],
    }
    # Inside <script> only "<" can end the element or open a comment; in JSON it stands in strings alone.
    document = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parents[1] / "templates" / "trace.html").read_text(encoding="utf-8")
    write_atomically(Path(file), template.replace("__DATA__", document))


def _side_by_side(traces: Mapping[str, Sequence[Trace]]) -> list[tuple[Trace, ...]]:
    """Traces by text; each holds one of every drafter."""
    counts = {name: len(part) for name, part in traces.items()}
    if len(set(counts.values())) != 1 or not all(counts.values()):
        raise InputError(f"Every drafter needs traces of the same texts, at least one; there are {counts}.")
    return list(zip(*traces.values(), strict=True))


def _rounded(value: Any) -> Any:
    """JSON with numbers to the four digits that are shown."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def marked_text(trace: Trace) -> Text:
    """A text as its blocks, the first rejected proposal of each shown; `.plain` is readable without colour."""
    text = Text(_visible(trace.first))
    for block in trace.blocks:
        text.append("│", STYLES["quiet"])
        text.append(_visible("".join(block.drafts[: block.num_accepted])), STYLES["accepted"])
        if block.choices:
            rejected = _visible(block.drafts[block.num_accepted]).replace("\n", "")
            text.append(f"⟨{rejected}⟩", STYLES["rejected"])
            text.append(_visible(block.choices[0]), STYLES["recovered"])
        elif block.bonus is not None:
            text.append(f"⁺{_visible(block.bonus)}", STYLES["bonus"])
    return text


def _visible(token: str) -> str:
    """A token as a terminal may show it: ends of lines marked, control characters spelled out and without effect."""
    named = re.sub(r"[\x00-\x09\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), token)
    return re.sub(r"[\x7f-\x9f]", "␡", named).replace("\n", "↵\n")


def print_traces(traces: Mapping[str, Sequence[Trace]], console: Console | None = None) -> None:
    """
    Print traces with their signs, and colours where the terminal has them.

    Args:
        traces (`Mapping[str, Sequence[Trace]]`): By drafter, over the same texts.
        console ([`~rich.console.Console`], *optional*): Standard output by default.
    """
    console = console or Console()
    for number, text in enumerate(_side_by_side(traces), start=1):
        parts = [Text(_visible(text[0].prompt).strip(), "dim")]
        for name, trace in zip(traces, text, strict=True):
            parts += ["", Text(f"{name}: τ {trace.acceptance_length:.2f}, {len(trace.blocks)} blocks", "bold")]
            parts += [marked_text(trace)]
        console.print(Panel(Group(*parts), title=f"text {number}", title_align="left"))
    console.print(Text.assemble(*((word, STYLES[kind]) for word, kind in LEGEND)))
