"""TRL's docstrings as Markdown, for `[[autodoc]]` lines. They hold Markdown already, but for their sections."""

import inspect
import re
from collections.abc import Callable


ITEMS = ("Args", "Parameters", "Attributes", "Raises")
SECTION = re.compile(rf"^({'|'.join(ITEMS)}|Returns|Yields|Examples?):$")
TITLES = {"Args": "Parameters"}
# "name (`type`), name (`type`): text": a colon in brackets or in code ends nothing.
ITEM = re.compile(r"((?:\((?:`[^`]*`|[^)`])*\)|`[^`]*`|[^:(`])+):(?:\s+(.*))?$")
BRACKETS = re.compile(r"(\((?:`[^`]*`|[^)`])*\))")


def parameters(docstring: str) -> list[str]:
    """Names under `Args` or `Parameters`, in their order."""
    heads = [head for title, body in sections(docstring) if title in ("Args", "Parameters") for head, _ in items(body)]
    return [name for head in heads for name in re.findall(r"\w+", BRACKETS.sub("", head or ""))]


def sections(docstring: str) -> list[tuple[str | None, list[str]]]:
    """(title, lines) in order: the lines of a section have lost its indentation, plain text has no title."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in docstring.splitlines():
        if title := SECTION.match(line):
            found.append((title[1], []))
        else:
            if found[-1][0] and line and not line.startswith("    "):
                found.append((None, []))
            found[-1][1].append(line[4:] if found[-1][0] else line)
    return found


def items(lines: list[str]) -> list[tuple[str | None, list[str]]]:
    """
    (head, lines) of each item of a section; of a line that groups those after it (`> Parameters that …`) the head is
    `None`.

    Raises:
        `ValueError`: A line that neither begins an item nor goes on with one.
    """
    found: list[tuple[str | None, list[str]]] = []
    for line in lines:
        if line.startswith("> "):
            found.append((None, [line[2:]]))
        elif not line or line.startswith(" "):
            if found:
                found[-1][1].append(line[4:])
        elif item := ITEM.match(line):
            found.append((item[1], [item[2]] if item[2] else []))
        else:
            raise ValueError(f"not an item of a docstring, such as 'name (`type`): text': {line!r}")
    return found


def as_markdown(docstring: str, link: Callable[[str], str]) -> str:
    """
    A docstring as MyST reads it: items as a definition list, and [`Name`] as whatever `link` makes of `Name`.

    Args:
        docstring (`str`):
            Cleaned of its indentation, as `inspect.getdoc` gives it.
        link (`Callable[[str], str]`):
            Name → Markdown.
    """
    written = []
    for title, body in sections(docstring):
        if title:
            written += [f"**{TITLES.get(title, title)}**", ""]
        written += _definitions(body, names=title != "Raises") if title in ITEMS else [*body, ""]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(written)).strip()
    return re.sub(r"\[`([^`]+)`\](?!\()", lambda reference: link(reference[1]), text)


def _definitions(body: list[str], names: bool) -> list[str]:
    written = []
    for head, lines in items(body):
        text = "\n".join(lines).strip().splitlines()
        if head is None:
            written += [f"*{text[0]}*", ""]
            continue
        if names:
            parts = BRACKETS.split(head)
            parts[::2] = [re.sub(r"\w+", r"`\g<0>`", part) for part in parts[::2]]
            head = "".join(parts)
        # Indented as a definition's text is, whatever is in it: lists, code.
        written += [head, *(f"{'  ' if number else ': '}{line}".rstrip() for number, line in enumerate(text)), ""]
    return written


def call(name: str, value: Callable) -> str:
    """
    How it is called, with defaults and without types, which stand in the docstring. What the docstring of a class
    leaves to the class above is left out.
    """
    documented = parameters(inspect.getdoc(value) or "")
    given = [parameter for parameter in inspect.signature(value).parameters.values() if parameter.name != "self"]
    shown = [parameter for parameter in given if parameter.name in documented or not isinstance(value, type)]
    written = [str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in shown]
    return f"{name}({', '.join(written + ['**kwargs'] * (len(shown) < len(given)))})"
