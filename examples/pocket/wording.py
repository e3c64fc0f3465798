"""Words and small phrases that the problems of ``tasks.py`` are made of."""

from __future__ import annotations

import random


def words(text: str) -> list[str]:
    """The words of a line of text, as a list."""
    return text.split()


NAMES = words("Anna Ben Cara Dan Eva Finn Gina Hugo Iris Jack Kim Leo Mia Noah Olga Paul Rosa Sam Tom Vera")
ITEMS = words("pen cup lamp book hat bag coin key card ball ring drum plate spoon apple lemon")
COLORS = words("red blue green black white pink gray brown")
PLACES = words("kitchen garden hall cellar office attic shed garage")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday")
COLUMNS = words("Ones Tens Hundreds Thousands")


def pick(rng: random.Random, *options: str) -> str:
    """Choose a wording; earlier ones are likelier, so that greedy text has a clear favourite, as real text has."""
    return rng.choices(options, weights=[1 / (i + 1) ** 1.5 for i in range(len(options))])[0]


def listing(words: list[str]) -> str:
    """Join words as prose does: ``a, b and c``."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def added(a: int, b: int) -> str:
    """Write an addition with two-digit summands split into tens and ones, so that each step changes one digit."""
    if a and b > 10 and b % 10:
        tens = b // 10 * 10
        return f"{a}+{b}={a}+{tens}+{b - tens}={a + tens}+{b - tens}={a + b}"
    return f"{a}+{b}={a + b}"


def subtracted(a: int, b: int) -> str:
    """Write a subtraction in the same small steps as :func:`added`."""
    if b > 10 and b % 10:
        tens = b // 10 * 10
        return f"{a}-{b}={a}-{tens}-{b - tens}={a - tens}-{b - tens}={a - b}"
    return f"{a}-{b}={a - b}"


def closing(rng: random.Random, text: str) -> str:
    """A sentence that states the result before the answer line."""
    return pick(rng, "So", "Therefore", "This means that", "In the end") + " " + text
