"""The site that `make docs` builds: docstrings as its pages show them, and what it refuses to build."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from docstrings import as_markdown, call, parameters


DOCSTRING = """Do it, as [`Other`] does.

Args:
    path (`str` or `os.PathLike`):
        Where, such as `a: b`.

        - or there
    > Parameters that group

    first (`dict[str, int]`), second ([`Other`], *optional*, defaults to `(1)`): Both.

Returns:
    A [`Thing`].

Raises:
    `ValueError` or `TypeError`: Always.

At last, [a page](page.md).
"""

MARKDOWN = """Do it, as <Other> does.

**Parameters**

`path` (`str` or `os.PathLike`)
: Where, such as `a: b`.

  - or there

*Parameters that group*

`first` (`dict[str, int]`), `second` (<Other>, *optional*, defaults to `(1)`)
: Both.

**Returns**

A <Thing>.

**Raises**

`ValueError` or `TypeError`
: Always.

At last, [a page](page.md)."""


def test_docstrings_are_markdown():
    assert as_markdown(DOCSTRING, "<{}>".format) == MARKDOWN
    assert parameters(DOCSTRING) == ["path", "first", "second"]


def test_what_is_no_item_of_a_docstring_is_an_error():
    with pytest.raises(ValueError, match="what is this"):
        as_markdown("Args:\n    what is this\n", str)


def test_calls_leave_inherited_parameters_to_the_class_above():
    class Above:
        def __init__(self, width: int, height: int = 2) -> None:
            """One."""

    class Below(Above):
        """
        Two.

        Args:
            height (`int`): Of it.
        """

    assert call("Above", Above.__init__) == "Above(width, height=2)"
    assert call("Below", Below) == "Below(height=2, **kwargs)"


def _build(source: Path, pages: dict[str, str]) -> subprocess.CompletedProcess:
    source.mkdir()
    for name, text in pages.items():
        (source / name).write_text(text, encoding="utf-8")
    command = ["--quiet", "--fail-on-warning", "--keep-going", "-c", ROOT / "docs", source, source / "build"]
    return subprocess.run([sys.executable, "-m", "sphinx", *command], capture_output=True, text=True)


def test_site_has_navigation_and_refuses_dead_links(tmp_path):
    contents = (
        "- title: Start\n  sections:\n  - {local: index, title: Overview}\n  - {local: other, title: The other}\n"
    )
    pages = {
        "_toctree.yml": contents,
        "index.md": "# One\n",
        "other.md": "# Two\n\n## A part\n\n[one](index.md#one)\n",
    }
    built = _build(tmp_path / "good", pages)
    assert built.returncode == 0, built.stderr
    html = (tmp_path / "good" / "build" / "other.html").read_text(encoding="utf-8")
    assert "The other" in html and 'href="index.html#one"' in html

    pages["index.md"] += "[a](gone.md) [b](other.md#gone-part) [c](gone.json) ![d](gone.png) [e](#gone-here)\n"
    built = _build(tmp_path / "dead", {**pages, "stray.md": "# Three\n"})
    assert built.returncode != 0
    for dead in ("gone.md", "gone-part", "gone.json", "gone.png", "gone-here", "stray.md"):
        assert dead in built.stderr, f"{dead} was let through"
