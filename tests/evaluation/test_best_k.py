"""Which K to serve with, by hand."""

import pytest

from draft_opd_trl.evaluation.best_k import Choice, best, choices, on_a_line, schedule


BY_SLOT = [0.8, 0.5, 0.25]


def test_a_round_commits_one_token_and_the_accepted_run():
    found = choices(BY_SLOT, {0: 2.0, 1: 2.0, 3: 4.0})
    assert found == [
        Choice(0, 1.0, 2.0, 1.0),
        Choice(1, pytest.approx(1.8), 2.0, pytest.approx(1.8)),
        Choice(3, pytest.approx(2.55), 4.0, pytest.approx(1.275)),
    ]
    assert best(found).num_draft_tokens == 1


def test_where_proposals_cost_nothing_all_are_wanted_and_where_they_pay_nothing_none():
    assert best(choices(BY_SLOT, dict.fromkeys(range(4), 1.0))).num_draft_tokens == 3
    assert best(choices(BY_SLOT, {0: 1.0, 1: 1.8, 2: 2.4})).num_draft_tokens == 0
    assert best(choices([0.0, 0.0], dict.fromkeys(range(3), 1.0))).num_draft_tokens == 0


def test_rounds_between_those_timed_lie_on_a_line():
    assert on_a_line({0: 9.0, 1: 2.0, 3: 4.0}, [0, 1, 2, 3, 4]) == {0: 9.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0}
    # Three points that no line meets: least squares.
    assert on_a_line({1: 1.0, 2: 4.0, 3: 4.0}, [5])[5] == pytest.approx(7.5)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: choices(BY_SLOT, {1: 1.0}), "Time K = 0"),
        (lambda: choices(BY_SLOT, {0: 1.0, 4: 1.0}), "none beyond the slots"),
        (lambda: on_a_line({0: 1.0, 2: 1.0}, [1]), "two different K above 0"),
    ],
)
def test_what_cannot_be_told_is_an_error(call, why):
    with pytest.raises(ValueError, match=why):
        call()


def test_a_schedule_is_in_ranges_from_one_on():
    assert schedule({8: 3, 1: 7, 32: 0}) == [[1, 1, 7], [2, 8, 3], [9, 32, 0]]
    assert schedule({4: 2}) == [[1, 4, 2]]
