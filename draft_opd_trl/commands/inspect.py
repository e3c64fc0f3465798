"""Say what a drafter folder is, which engines load it and how, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.checks import settle
from ..core.limits import LIMITS


@dataclass
class InspectArguments:
    """What to look at."""

    path: str = field(metadata={"help": "Drafter: path or id, in any layout.", "positional": True})
    target: str | None = field(
        default=None, metadata={"help": "Its target: path or id, of which the config is read. Judges the fit."}
    )
    revision: str | None = field(default=None, metadata={"help": "Of the drafter on the Hub."})

    def __post_init__(self) -> None:
        settle(self, LIMITS)


ARGUMENTS = (InspectArguments,)
_ANSWERS = {True: "yes", False: "no", None: "not known"}


def run(arguments: InspectArguments) -> dict[str, Any]:
    from ..folders.inspection import inspect_drafter

    return inspect_drafter(arguments.path, arguments.target, arguments.revision)


def show(result: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in result["dtypes"].items())
    lines = [
        result["path"],
        f"  {result['kind'] or 'unknown'} drafter, {result['layout']}",
        *([f"  trained on {result['base']}"] if result["base"] else []),
        f"  {result['num_parameters']:,} parameters; tensors: {dtypes}",
        *(f"  {name}: {value}" for name, value in result["config"].items()),
        *([f"  target: {result['target_family']}"] if result["target_family"] else []),
        "",
        "Loads in",
        *(f"  {loader}: {_ANSWERS[loads]}" for loader, loads in result["loads"].items()),
        "",
        "Found" if result["faults"] else "Nothing is wrong with it.",
    ]
    for fault in result["faults"]:
        breaks = f" (breaks {', '.join(fault['breaks'])})" if fault["breaks"] else ""
        lines.append(f"  - {fault['fault']}{breaks}")
    for engine, command in result["launch"].items():
        lines += ["", f"Serve with {engine}", *(f"  {line}" for line in command.splitlines())]
    return "\n".join(lines)
