"""Names and values of others, written into Markdown so that they stay text. Knows no cards."""

from __future__ import annotations

import re


def one_line(text: object) -> str:
    """Text without line breaks and control characters."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())


def plain(text: object) -> str:
    """Text that shows as it is, also in a table's cell: no links, markup or HTML come of it."""
    escaped = re.sub(r"([\\`*\[\]|~$!#])", r"\\\1", one_line(text))
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)  # Within a word it is a letter.
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """A code span that holds the text whatever backticks are in it."""
    line = one_line(text)
    ticks = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def cell(markdown: str) -> str:
    """Markdown with a code span in it, for a table's cell, which a bare bar would end."""
    return re.sub(r"(?<!\\)\|", r"\\|", markdown)


def fence(*texts: str) -> str:
    """What opens and closes a code block that holds these texts."""
    return "`" * max(3, *(len(run) + 1 for text in texts for run in re.findall(r"`+", text)), 3)
