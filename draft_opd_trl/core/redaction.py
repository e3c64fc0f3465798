"""What must not be printed, logged or saved: tokens and passwords, wherever they stand in settings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, Self


_SECRET = ("token", "password", "passwd", "secret", "api_key", "apikey", "authorization", "credentials")
LONGEST = 80


def is_secret(name: str) -> bool:
    """Whether a setting of that name holds something only its owner may read; `stop_token_ids` and the like do not."""
    name = name.lower().replace("-", "_")
    return any(name == word or name.endswith(f"_{word}") for word in _SECRET)


def redact_url(url: str) -> str:
    """An address without the user and password that may stand in it, also one that cannot be parsed."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme, rest = "", url
    # A password may itself hold slashes, so all that stands before the last @ goes.
    _, at, place = rest.rpartition("@")
    return f"{scheme}{slashes}{'***@' if at and slashes else ''}{place}"


def without_secrets(value: Any, name: str = "") -> Any:
    """
    A copy that may be shown: secrets by name (`<TOKEN>`), addresses without passwords, and what JSON cannot hold (a
    dtype, a quantisation config) as plain values.

    Args:
        value: A setting, or a mapping of settings, at any depth.
        name (`str`, *optional*): Of the setting.
    """
    if value is None or isinstance(value, bool | int | float):
        # `token: true` asks for the token that is stored, and is none.
        return value
    if is_secret(name):
        return f"<{name.upper()}>"
    if isinstance(value, Mapping):
        return {str(key): without_secrets(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [without_secrets(entry) for entry in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str):
        return redact_url(value) if "://" in value else value
    if hasattr(value, "to_dict"):
        return without_secrets(value.to_dict())
    return str(value).removeprefix("torch.")


def drop_secrets(value: Any) -> Any:
    """A copy of a mapping, at any depth, without the entries that are secret; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    return {key: drop_secrets(entry) for key, entry in value.items() if not is_secret(str(key))}


def shown(name: str, value: Any) -> str:
    """A setting as an error shows it: on one line, not too long, and without what is secret."""
    if is_secret(name):
        return "a secret that is not shown"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping | list | tuple | set):
        try:
            value = without_secrets(value)
        except RecursionError:
            return f"a {type(value).__name__}"
    elif isinstance(value, str) and (name.endswith("url") or "://" in value):
        value = redact_url(value)
    try:
        words = repr(value)
    except Exception:  # what was given may be anything
        return f"a {type(value).__name__}"
    words = " ".join(words.split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]}…"


class KeepsSecrets:
    """For a dataclass of settings: what may leave the process is everything but its secrets."""

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain values, without tokens and passwords, wherever they stand."""
        return without_secrets({entry.name: getattr(self, entry.name) for entry in fields(self)})

    def __str__(self) -> str:
        settings = "".join(f"{name}={value!r},\n" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{settings})"

    def __repr__(self) -> str:
        return str(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which the Trainer leaves in every checkpoint. A copy (`copy.copy`) keeps its tokens."""
        state = dict(self.__dict__)
        for name, value in state.items():
            if is_secret(name):
                state[name] = None
            elif isinstance(value, str) and "://" in value:
                state[name] = redact_url(value)
            else:
                state[name] = drop_secrets(value)
        return state

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
