"""Results files of evaluation: a line of settings, then one line a text, appended as texts end, resumed after a kill.

Knows counts and files, and nothing of how texts are decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import InputError
from ..core.files import write_atomically
from ..decoding.acceptance import AcceptanceReport


def fingerprint_of(prompts: Sequence[Sequence[int]]) -> str:
    """Of what was decoded: figures are compared over the same prompts, or not at all."""
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


class LinesFile:
    """
    What was measured so far.

    Args:
        file (`Path`, *optional*): JSON lines, resumed if it is there; without one, lines are kept in memory only.
        settings (`dict`): JSON-able; what the results depend on.

    Attributes:
        lines (`list[dict]`): Those there are.

    Raises:
        `ValueError`: The file holds results of other settings.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file = file
        self.lines: list[dict[str, Any]] = []
        settings = json.loads(json.dumps(settings))
        if file is None:
            return
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        # A kill may leave half a line, without an end.
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if lines:
            self._check(json.loads(lines[0]), settings)
        else:
            lines = [json.dumps(settings) + "\n"]
        write_atomically(file, "".join(lines))
        self.lines = [json.loads(line) for line in lines[1:]]

    def _check(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        differing = [
            f"{name} was {theirs.get(name)!r} and is {ours.get(name)!r}"
            for name in sorted({*theirs, *ours})
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.file} holds results of other settings: {'; '.join(differing)}. Choose another output "
                "directory, or delete the file to measure anew."
            )

    def append_line(self, line: dict[str, Any]) -> None:
        """Keep a line."""
        self.lines.append(line)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


class ResultsFile(LinesFile):
    """
    Texts measured so far; see [`LinesFile`].

    Attributes:
        done (`dict[int, AcceptanceReport]`): By prompt, the report of its text alone.
    """

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        super().__init__(file, settings)
        self.done: dict[int, AcceptanceReport] = dict(map(_report_of, self.lines))

    def append(self, prompt: int, report: AcceptanceReport) -> None:
        """Keep the report of one text."""
        self.done[prompt] = report
        self.append_line(_line_of(prompt, report))


def read_reports(file: Path) -> dict[int, AcceptanceReport]:
    """By prompt, the report of its text alone, as a results file holds it."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return dict(_report_of(json.loads(line)) for line in lines)


def _line_of(prompt: int, report: AcceptanceReport) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "num_draft_tokens": report.num_draft_tokens,
        "completion": report.completions[0],
        "accepted": report.accepted[0],
        "stopped": report.stopped[0],
        "seconds": report.seconds,
        "draft_seconds": report.draft_seconds,
        "verify_seconds": report.verify_seconds,
        "replayed": report.replayed,
    }


def _report_of(line: dict[str, Any]) -> tuple[int, AcceptanceReport]:
    times = (line["seconds"], line["draft_seconds"], line["verify_seconds"])
    texts = ([line["completion"]], [line["accepted"]], [line["stopped"]])
    return line["prompt"], AcceptanceReport(
        line["num_draft_tokens"], *texts, *times, replayed=line.get("replayed", False)
    )
