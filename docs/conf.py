"""The site, built by Sphinx from the Markdown of `docs/source`: `make docs`."""

import functools
import inspect
import re
import sys
from pathlib import Path

import yaml


DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import docstrings  # noqa: E402

import draft_opd_trl  # noqa: E402


project = draft_opd_trl.__name__
version = release = draft_opd_trl.__version__
copyright = "the authors of draft_opd_trl, Apache License 2.0"

extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "index"
html_theme = "furo"
html_title = project
html_copy_source = False
# Without a language a block is output, or a drawing.
highlight_language = "text"
# One parameter a line where a call does not fit.
python_maximum_signature_line_length = 80

# As GitHub shows the same files: anchors of headings, tables, notes.
myst_heading_anchors = 4
myst_enable_extensions = ["alert", "deflist"]
copybutton_prompt_text = "$ "


def add_contents(app, page, source):
    """The table of contents is `_toctree.yml`, as in every project of the ecosystem."""
    if page == root_doc:
        for part in yaml.safe_load((Path(app.srcdir) / "_toctree.yml").read_text("utf-8")):
            lines = [f"{entry['title']} <{entry['local']}>" for entry in part["sections"]]
            lines = [line.replace(f"<{root_doc}>", "<self>") for line in lines]
            source[0] += "\n\n```{toctree}\n:hidden:\n:caption: " + "\n".join([part["title"], "", *lines]) + "\n```\n"


def add_docstrings(app, page, source):
    """`[[autodoc]] Name` is the docstring of a public name; lines of `- member` under it add those of members."""
    source[0] = re.sub(
        r"^\[\[autodoc\]\] (\w+)((?:\n {4}- \w+)*)$",
        lambda line: describe(line[1], re.findall(r"- (\w+)", line[2])),
        source[0],
        flags=re.MULTILINE,
    )


def describe(name, members):
    value = getattr(draft_opd_trl, name)
    if not callable(value):
        return directive("data", name, "", 4)
    kind = "class" if isinstance(value, type) else "function"
    text = [written(value), *(describe_member(value, member) for member in members)]
    return directive(kind, docstrings.call(name, value), "\n\n".join(text), 5)


def describe_member(owner, name):
    member = getattr(owner, name)
    if isinstance(member, property | functools.cached_property):
        return directive("property", name, written(member), 4)
    return directive("method", docstrings.call(name, member), written(member), 4)


def written(value):
    return docstrings.as_markdown(inspect.getdoc(value) or "", link)


def directive(kind, head, text, ticks):
    # A longer fence holds a shorter one.
    fence = "`" * ticks
    return f"{fence}{{py:{kind}}} {head}\n\n{text}\n{fence}"


def link(name):
    """A public name leads to its section of the API."""
    name = name.removeprefix("~")
    return f"[`{name}`](api.md#{name.lower()})" if name in draft_opd_trl.__all__ else f"`{name}`"


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("source-read", add_docstrings)
