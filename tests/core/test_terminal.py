"""Tables as a terminal and a file show them."""

from draft_opd_trl.core.terminal import as_text, grid, table


def test_numbers_are_flush_right_and_the_first_column_is_not():
    text = as_text(table(["part", "GB"], [["weights", "10.5"], ["x", "2.0"]], numbers=True))
    lines = text.splitlines()
    assert [line.split() for line in lines if line.strip(" ─")] == [["part", "GB"], ["weights", "10.5"], ["x", "2.0"]]
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].startswith("x ")


def test_a_grid_has_neither_heads_nor_lines():
    assert as_text(grid([["one", "two"], ["three", "4"]])) == "one    two\nthree  4"


def test_others_words_stay_as_they_are():
    """No markup, no emoji, and nothing folded: a path that is cut would be another."""
    odd = "[red]a[/red] :smile: " + "long/" * 100 + "path"
    assert as_text(odd) == odd
    assert odd in as_text(table(["name"], [[odd]])).splitlines()
    assert as_text("one  ", "two\n\n") == "one\ntwo"
