"""Acceptance before training and now, on the same prompts: the paired change, and the files that tell it.

Knows reports, and nothing of how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..core.files import write_atomically
from ..decoding.acceptance import DEFINITION, AcceptanceReport, difference
from .report import acceptance_table
from .results import fingerprint_of


@dataclass
class Measured:
    """
    One evaluation.

    Args:
        prompts (`str`): Fingerprint of what was decoded: a change is of the same prompts, or none.
        report ([`AcceptanceReport`]): What came of it.
    """

    prompts: str
    report: AcceptanceReport


class BeforeAfter:
    """
    What evaluation said, by set of prompts: once before the first step, and last.

    Attributes:
        before, last (`dict[str, Measured]`): By name of the set, which is the prefix of its metrics.
    """

    def __init__(self) -> None:
        self.before: dict[str, Measured] = {}
        self.last: dict[str, Measured] = {}

    def note(self, name: str, prompts: Sequence[Sequence[int]], report: AcceptanceReport, step: int) -> None:
        """Keep an evaluation of the weights of `step`."""
        measured = Measured(fingerprint_of(prompts), report)
        self.last[name] = measured
        if step == 0:
            self.before[name] = measured

    def change(self, name: str) -> dict[str, float] | None:
        """τ now − τ before with its 95 % interval, paired by prompt; `None` unless both were measured."""
        before, last = self.before.get(name), self.last.get(name)
        if before is None or last is None or last is before or last.prompts != before.prompts:
            return None
        return difference(last.report, before.report)

    def reports(self, name: str, called: tuple[str, str]) -> dict[str, AcceptanceReport]:
        """Of the drafter before and the drafter now, by what they are called; the one before only if comparable."""
        before = {called[0]: self.before[name].report} if self.change(name) is not None else {}
        return {**before, called[1]: self.last[name].report}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run compares with; lists and numbers."""
        return {name: asdict(measured) for name, measured in self.before.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, kept in state.items():
            self.before[name] = Measured(kept["prompts"], AcceptanceReport(**kept["report"]))


def results_of(
    measured: BeforeAfter,
    name: str,
    called: tuple[str, str],
    law: str,
    start: tuple[str, Measured] | None = None,
) -> dict[str, Any]:
    """
    The comparison as a results file has it.

    Args:
        measured ([`BeforeAfter`]): Of a run.
        name (`str`): Set of prompts, evaluated last with the trained weights.
        called (`tuple[str, str]`): The drafters' names, the start's first.
        law (`str`): How they decoded, such as "temperature 0".
        start (`tuple[str, Measured]`, *optional*): Name and measurement of what an earlier stage began from.

    Returns:
        JSON-able `dict`: `before` (`None` unless the same prompts were measured then), `after`, their paired
        `difference`, and the `table` of both. After an earlier stage also `start`, the `table` of all three, and the
        paired `gains` of each stage and of both.
    """
    reports = measured.reports(name, called)
    entries = [{"drafter": drafter, **report.summary()} for drafter, report in reports.items()]
    earlier: dict[str, Any] = {}
    if start is not None and len(entries) == 2 and start[1].prompts == measured.last[name].prompts:
        first = start[1].report
        reports = {start[0]: first, **reports}
        gains = {f"{b} − {a}": difference(reports[b], reports[a]) for a, b in combinations(reports, 2)}
        earlier = {"start": {"drafter": start[0], **first.summary()}, "gains": gains}
    return {
        "definition": DEFINITION,
        "law": law,
        "prompts": len(measured.last[name].report),
        "before": entries[0] if len(entries) == 2 else None,
        "after": entries[-1],
        "difference": measured.change(name),
        **earlier,
        "table": acceptance_table(reports),
    }


def write_results(results: Mapping[str, Any], folder: Path) -> None:
    """`results.json`, and its table as `results.md`."""
    figures = {key: value for key, value in results.items() if key != "table"}
    write_atomically(folder / "results.json", json.dumps(figures, indent=2) + "\n")
    write_atomically(folder / "results.md", results["table"] + "\n")
