"""Settings held against their types and ranges: the type is read from the annotation, the range from a table of rules.

A rule takes a value of the right type and returns what it must be, in words, or `None` if it is that. The settings
themselves are not known here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from .errors import InputError, InputTypeError
from .redaction import shown


Rule = Callable[[Any], str | None]
_NOTHING = object()


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean …?`, or nothing where no known word is near."""
    names = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.5)
    return f" Did you mean {names[matches[0]]}?" if matches else ""


@dataclasses.dataclass(frozen=True)
class Within:
    """
    A number in a range.

    Args:
        low, high (`float`, *optional*): Smallest and largest.
        above, below (`float`, *optional*): The same, themselves outside.
        also (`tuple[float, ...]`, *optional*): Numbers outside the range that have a meaning of their own.
        reason (`str`, *optional*): What the range says.
        whole (`bool`, *optional*, defaults to `False`): Above 1 it counts something, and has no fraction.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    reason: str = ""
    whole: bool = False

    def __call__(self, value: float) -> str | None:
        if value in self.also:
            return None
        inside = (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if not inside:
            return f"must {self.words()}{f' ({self.reason})' if self.reason else ''}"
        if self.whole and value > 1 and value != int(value):
            return "must be a whole number where it is above 1 (below, it is a share of all steps)"
        return None

    def words(self) -> str:
        start = f"({self.above:g}" if self.above is not None else f"[{self.low:g}" if self.low is not None else "(−∞"
        end = f"{self.below:g})" if self.below is not None else f"{self.high:g}]" if self.high is not None else "∞)"
        return "".join(f"be {number:g}, or " for number in self.also) + f"lie in {start}, {end}"


def one_of(*choices: str) -> Rule:
    """One of some words."""

    def rule(value: str) -> str | None:
        if value in choices:
            return None
        return f"must be one of {', '.join(choices)}.{nearest(str(value), choices)}".removesuffix(".")

    return rule


def words(*choices: str) -> Rule:
    """Words with spaces between them, or none at all; any words without `choices`."""

    def rule(value: str) -> str | None:
        return next((reason for word in value.split() if choices and (reason := one_of(*choices)(word))), None)

    return rule


def text(value: str) -> str | None:
    """Words, and not none."""
    if not isinstance(value, str):
        return f"must be text, not of type {type(value).__name__}"
    if not value.strip():
        return "must not be empty"
    good = "\0" not in value and value.encode(errors="replace").decode() == value
    return None if good else "holds characters that cannot be written"


def path(value: str) -> str | None:
    """The name of a file or folder, there or not."""
    if reason := text(value):
        return reason
    long = any(len(os.fsencode(part)) > 255 for part in value.split("/")) or len(os.fsencode(value)) > 4096
    return "is longer than a path may be" if long else None


def http_url(value: str) -> str | None:
    """Where a server listens."""
    try:
        parts = urlsplit(value)
        good = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and value == value.strip()
        )
    except ValueError:
        good = False
    return None if good and not any(c.isspace() for c in value) else "must be an address such as http://localhost:8000"


def pairs(value: str) -> str | None:
    """`name=value,name=value`."""
    good = all(word.count("=") == 1 and all(side.strip() for side in word.split("=")) for word in value.split(","))
    return None if good else "must be name=value pairs with commas between them"


def mapping(known: Sequence[str] = (), taken: Sequence[str] = (), by: str = "", **rules: Rule) -> Rule:
    """
    A mapping of names to values.

    Args:
        known (`Sequence[str]`): The only names there are; any name by default.
        taken (`Sequence[str]`): Names that are set elsewhere.
        by (`str`): Who takes the mapping.
        rules: Of some of the values, which may also be `None`.
    """

    def rule(value: Mapping) -> str | None:
        for name, entry in value.items():
            if not isinstance(name, str):
                return f"must have names as keys, and {name!r} is none"
            if known and name not in known:
                return f"holds {name!r}, but {by} takes {', '.join(known)}.{nearest(name, known)}".removesuffix(".")
            if name in taken:
                return f"must not hold {name!r}, which is set for {by} already"
            if name in rules and entry is not None and (reason := rules[name](entry)):
                return f"holds {name!r} = {shown(name, entry)}, which {reason}"
        return None

    return rule


def jsonable(value: Any) -> str | None:
    """Something that JSON can hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return "must hold plain values (text, numbers, true, false, lists and mappings of these)"
    return None


def never(reason: str) -> Rule:
    """Nothing at all, as what the setting asks for is not done here."""
    return lambda value: f"cannot be used here: {reason}. Leave it unset"


def both(*rules: Rule) -> Rule:
    """All of some rules."""
    return lambda value: next((reason for rule in rules if (reason := rule(value))), None)


plain_mapping = both(mapping(), jsonable)


def read_json(name: str, value: str) -> Any:
    """
    A setting that came as the text of a mapping, as the command line gives it.

    Raises:
        `ValueError`: It is not JSON.
    """
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"`{name}` is {shown(name, value)}, which is not JSON ({error}). Give a mapping such as "
            '\'{"name": "value"}\'.'
        ) from None


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's own."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _as(value: Any, hint: Any) -> Any:
    """The value as the annotation `hint` wants it, or `_NOTHING`. Booleans are no numbers, and numbers no booleans."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return next((got for part in arguments if (got := _as(value, part)) is not _NOTHING), _NOTHING)
    if origin is typing.Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in arguments) else _NOTHING
    kind = origin or hint
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return _NOTHING
        if isinstance(value, numbers.Integral):
            return int(value) if kind is int else _as_float(int(value))
        return float(value) if kind is float and math.isfinite(value) else _NOTHING
    if kind is dict:
        return value if isinstance(value, dict) else _NOTHING
    if kind in (list, Sequence):
        many = isinstance(value, list | tuple | range) if kind is Sequence else isinstance(value, list | tuple)
        items = [_as(_plain(item), arguments[0] if arguments else Any) for item in value] if many else [_NOTHING]
        return _NOTHING if any(item is _NOTHING for item in items) else items
    if kind in (None, types.NoneType):
        return None if value is None else _NOTHING
    return value if isinstance(value, kind) else _NOTHING


def _as_float(value: int) -> int | float:
    """Optimizers mix no whole numbers with others. What is too large for a float is left to the range."""
    try:
        return float(value)
    except OverflowError:
        return value


_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", dict: "a mapping"}


def _in_words(hint: Any) -> str:
    """An annotation for people."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_in_words(part) for part in arguments if part is not types.NoneType]
        return " or ".join(dict.fromkeys([*parts, *(["nothing (None)"] if types.NoneType in arguments else [])]))
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if (origin or hint) in (list, Sequence):
        return f"a list of {_in_words(arguments[0])}" if arguments else "a list"
    return _WORDS.get(origin or hint) or f"a {getattr(hint, '__name__', hint)}"


def _inner(hint: Any) -> Any:
    """What the items of a list must be, where lists may stand."""
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) in (list, Sequence):
            return typing.get_args(part)[0]
    return None


def _enum_of(hint: Any) -> type[Enum] | None:
    """The enumeration an annotation names, whose values alone may then stand there as text."""
    kinds = [hint, *typing.get_args(hint)]
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, Enum)), None)


def check_value(name: str, value: Any, hint: Any, rule: Rule | None = None, default: Any = _NOTHING) -> Any:
    """
    One setting against its type and its rule.

    Args:
        name (`str`): What the error calls it.
        value: What was given.
        hint: An annotation. `None` passes where it allows that, whatever the rule; of a list each item is checked.
        rule (`Rule`, *optional*): Of values of that type.
        default (*optional*): What it is without being given, for the error.

    Returns:
        The value; NumPy's numbers and paths as Python's own numbers and text.

    Raises:
        `ValueError` or `TypeError`: It is not that.
    """
    value = _plain(value)
    if isinstance(value, os.PathLike) and rule is path:
        value = os.fspath(value)
    remedy = "" if default in (_NOTHING, None) else f" Its default is {default!r}."
    got = _as(value, hint)
    if got is _NOTHING and isinstance(value, list | tuple) and (inner := _inner(hint)) is not None:
        # The item that is wrong, by itself.
        return [check_value(name, item, inner, rule, default) for item in value]
    if got is _NOTHING:
        nan = isinstance(value, float) and not math.isfinite(value)
        kind = "" if nan else f", of type {type(value).__name__}"
        message = f"`{name}` is {shown(name, value)}{kind}; it must be {_in_words(hint)}.{remedy}"
        raise (InputError if nan else InputTypeError)(message)
    if got is None:
        return None
    choices = _enum_of(hint)
    for entry in got if isinstance(got, list) else [got]:
        if isinstance(entry, bool | Enum) or not isinstance(entry, str | int | float | dict):
            continue
        entry_rule = rule
        if isinstance(entry, str):
            entry_rule = one_of(*(choice.value for choice in choices)) if choices else rule or text
        elif isinstance(entry, dict):
            entry_rule = rule or plain_mapping
        if entry_rule is not None and (reason := entry_rule(entry)):
            raise InputError(f"`{name}` is {shown(name, entry)}; it {reason}.{remedy}")
    return got


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def settle(
    settings: Any,
    table: Mapping[str, Rule],
    hints: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **rules: Rule,
) -> None:
    """
    Hold every field of a dataclass against its annotation and its rule, and write it back as plain Python.

    Args:
        settings (dataclass instance): May be frozen.
        table (`Mapping[str, Rule]`): Rules by field name.
        hints (`Mapping[str, Any]`, *optional*): Annotations in place of the class's own.
        defaults (`Mapping[str, Any]`, *optional*): What errors call a field's default, in place of the class's own.
        rules: More rules, before the table's.

    Raises:
        `ValueError` or `TypeError`: For the first field that is not what it must be.
    """
    annotations = {**_hints(type(settings)), **(hints or {})}
    for field in dataclasses.fields(settings):
        rule = rules.get(field.name) or table.get(field.name)
        default = (defaults or {}).get(field.name, field.default)
        default = _NOTHING if default is dataclasses.MISSING else default
        value = check_value(field.name, getattr(settings, field.name), annotations[field.name], rule, default=default)
        object.__setattr__(settings, field.name, value)
