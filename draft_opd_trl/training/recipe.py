"""Recipes: sets of defaults, a YAML file each in `recipes/`. Knows no field and no value."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml


FOLDER = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Those there are."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


@functools.cache
def read_recipe(name: str) -> Mapping[str, Any]:
    """What a recipe sets, by field; what it leaves out is the default recipe's."""
    own = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return own if name == "default" else {**read_recipe("default"), **own}


class OfRecipe:
    """
    The default of a field that recipes fill.

    Parsers hand a dataclass every default, and `dataclasses.replace` every value. What was not given is this object,
    so that a value that was given is never taken for it, whatever it equals. Shown as what the default recipe sets.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return str(self.value_in("default"))

    def value_in(self, recipe: str) -> Any:
        """What a recipe sets it to."""
        return read_recipe(recipe)[self.name]


def defaults_of(settings: Any, recipe: str) -> dict[str, Any]:
    """The default of every field of a dataclass instance under a recipe."""
    defaults = {field.name: field.default for field in fields(settings)}
    return {
        name: default.value_in(recipe) if isinstance(default, OfRecipe) else default
        for name, default in defaults.items()
    }


def fill(settings: Any, defaults: Mapping[str, Any]) -> None:
    """Give every field that was not given its default."""
    for name, default in defaults.items():
        if isinstance(getattr(settings, name), OfRecipe):
            setattr(settings, name, default)
