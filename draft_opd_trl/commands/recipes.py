"""List the recipes that `draft-opd train --config NAME` takes, or print one.

A recipe is a YAML file of options for one situation. `draft-opd recipes NAME > mine.yaml` is the start of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.checks import nearest
from ..core.errors import NotFoundError
from ..core.terminal import as_text, grid


FOLDER = Path(__file__).parents[1] / "recipes"


@dataclass
class RecipesArguments:
    """Which recipe."""

    name: str | None = field(default=None, metadata={"help": "Print this one.", "positional": True})


ARGUMENTS = (RecipesArguments,)


def recipes() -> dict[str, Path]:
    """Their files by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.yaml"))}


def config_file(given: str) -> str:
    """
    The file that `--config` means: one that is there, or that of a recipe.

    Raises:
        `FileNotFoundError`: Neither.
    """
    if Path(given).is_file():
        return given
    known = recipes()
    if given not in known:
        raise NotFoundError(
            f"--config {given} is not a file here, nor a recipe. Give the path of a YAML file, or a name that "
            f"`draft-opd recipes` lists.{nearest(given, known)}"
        )
    return str(known[given])


def run(arguments: RecipesArguments) -> dict[str, Any]:
    known = recipes()
    if arguments.name is None:
        return {"recipes": {name: _text(file).splitlines()[0].removeprefix("# ") for name, file in known.items()}}
    if arguments.name not in known:
        raise NotFoundError(
            f"There is no recipe {arguments.name!r}. `draft-opd recipes` lists them.{nearest(arguments.name, known)}"
        )
    return {"name": arguments.name, "text": _text(known[arguments.name])}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8").rstrip("\n")


def show(result: dict[str, Any]) -> str:
    if "text" in result:
        return result["text"]
    lines = [["", name, about] for name, about in result["recipes"].items()]
    tail = "`draft-opd recipes NAME` prints one; `draft-opd train --config NAME` runs it."
    return as_text(grid(lines), "", tail)
