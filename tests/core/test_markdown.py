"""Others' names and values in Markdown: by hand, each as a reader of the page would see it."""

import pytest

from draft_opd_trl.core.markdown import cell, code, fence, one_line, plain


def test_one_line_has_no_breaks_and_no_control_characters():
    assert one_line("a\n b\t\x1b[31mc\u202e") == "a b [31mc"
    assert one_line(7) == "7"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("*a* [b](c)", r"\*a\* \[b\](c)"),
        ("snake_case _word_", r"snake_case \_word\_"),
        ("a | b", r"a \| b"),
        ("<script>&", "&lt;script&gt;&amp;"),
        ("# a\n# b", r"\# a \# b"),
    ],
)
def test_plain_text_makes_no_markup(text, written):
    assert plain(text) == written


@pytest.mark.parametrize(
    ("text", "written"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`a`", "`` `a` ``"), ("", "`  `"), ("a``b`", "``` a``b` ```")],
)
def test_a_code_span_is_longer_than_the_ticks_in_it(text, written):
    assert code(text) == written


def test_a_bar_ends_no_cell():
    assert cell("`a|b`") == r"`a\|b`"
    assert cell(r"a\|b") == r"a\|b"


def test_a_fence_is_longer_than_any_in_its_block():
    assert fence("plain") == "```"
    assert fence("a", "````\nb") == "`````"
