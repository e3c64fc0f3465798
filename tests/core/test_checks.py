"""Settings against types and rules, by hand. Every field of every dataclass of settings is in test_limits.py."""

import dataclasses
import enum
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from draft_opd_trl.core import checks
from draft_opd_trl.core.checks import Within, check_value, mapping, one_of, settle
from draft_opd_trl.core.errors import InputError, InputTypeError


class Colour(enum.Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "hint", "taken"),
    [
        (3, float, 3.0),
        (np.int64(3), int, 3),
        (np.float32(0.5), float | None, 0.5),
        (np.bool_(True), bool, True),
        ((1, 2), list[int], [1, 2]),
        (None, int | None, None),
        ("red", Colour, "red"),
        ("a", Literal["a", 1], "a"),
        (10**400, float, 10**400),  # too large for a float: for the range to refuse
    ],
)
def test_what_means_the_same_is_taken_as_python_has_it(value, hint, taken):
    hint = Colour | str if hint is Colour else hint
    got = check_value("name", value, hint)
    assert got == taken and type(got) is type(taken)


@pytest.mark.parametrize(
    ("value", "hint", "error", "words"),
    [
        (True, int, InputTypeError, "`name` is True, of type bool; it must be a whole number."),
        (1, bool, InputTypeError, "`name` is 1, of type int; it must be true or false."),
        (1.0, int, InputTypeError, "must be a whole number"),
        (math.nan, float, InputError, "`name` is nan; it must be a finite number."),
        ("x", list[int], InputTypeError, "must be a list of a whole number"),
        ([1, "x"], list[int] | None, InputTypeError, "`name` is 'x', of type str; it must be a whole number"),
        (2, Literal["a", 1], InputTypeError, "must be a or 1"),
        ("blue", Colour | str, InputError, "it must be one of red"),
        ("", str, InputError, "it must not be empty"),
        ({1: 2}, dict, InputError, "must have names as keys, and 1 is none"),
    ],
)
def test_what_is_of_another_type_is_refused_in_words(value, hint, error, words):
    with pytest.raises(error) as raised:
        check_value("name", value, hint)
    assert words in str(raised.value)


def test_the_default_is_told():
    with pytest.raises(InputTypeError, match="Its default is 3.$"):
        check_value("name", "x", int, default=3)


@pytest.mark.parametrize(
    ("rule", "right", "wrong", "words"),
    [
        (Within(0, 1), (0, 0.5, 1), (-0.1, 1.1), "must lie in [0, 1]"),
        (Within(above=0, below=1), (0.5,), (0, 1), "must lie in (0, 1)"),
        (Within(1, also=(-1,), reason="−1 is all"), (-1, 1), (0,), "must be -1, or lie in [1, ∞) (−1 is all)"),
        (Within(0, whole=True), (0.5, 1, 2.0), (1.5,), "must be a whole number where it is above 1"),
    ],
)
def test_ranges(rule, right, wrong, words):
    assert [rule(value) for value in right] == [None] * len(right)
    assert all(words in rule(value) for value in wrong)


def test_words_are_told_the_nearest_one():
    rule = one_of("cosine", "linear")
    assert rule("linear") is None
    assert rule("cosin") == "must be one of cosine, linear. Did you mean cosine?"
    assert rule("xyz") == "must be one of cosine, linear"
    assert checks.words("auto_wrap", "offload")("offload auto_wrap") is None
    assert "must be one of" in checks.words("auto_wrap", "offload")("offload wings")


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (checks.path, ("a/b", "é"), ("", "a\0b", "a" * 256, "a/" * 2100, "\ud800")),
        (checks.http_url, ("http://a", "https://[::1]:80/x"), ("a", "ftp://a", "http://", "http://a:0", "http://a b")),
        (checks.pairs, ("a=1", "a=1,b=2"), ("a", "a=", "=1", "a=1,", "a=b=c")),
        (checks.jsonable, ({"a": [1, None]},), ({"a": math.nan}, {"a": object()})),
    ],
    ids=["path", "url", "pairs", "json"],
)
def test_rules_by_hand(rule, right, wrong):
    assert [value for value in right if rule(value)] == []
    assert [value for value in wrong if not rule(value)] == []


def test_mappings():
    rule = mapping(known=("dtype", "revision"), taken=("revision",), by="the target", dtype=one_of("auto"))
    assert rule({"dtype": "auto"}) is rule({"dtype": None}) is rule({}) is None
    assert rule({"dtyp": 1}) == "holds 'dtyp', but the target takes dtype, revision. Did you mean dtype?"
    assert rule({"revision": "x"}) == "must not hold 'revision', which is set for the target already"
    assert rule({"dtype": "x"}) == "holds 'dtype' = 'x', which must be one of auto"


def test_what_is_not_json_is_told_without_what_is_secret():
    assert checks.read_json("name", '{"a": 1}') == {"a": 1}
    with pytest.raises(InputError, match="`name` is '{a', which is not JSON .*Give a mapping such as"):
        checks.read_json("name", "{a")
    with pytest.raises(InputError) as raised:
        checks.read_json("server_token", "hunter2")
    assert "hunter2" not in str(raised.value)


@dataclasses.dataclass(frozen=True)
class Settings:
    share: float = 0.5
    place: str | None = None

    def __post_init__(self):
        settle(self, {"share": Within(0, 1), "place": checks.path})


def test_a_frozen_dataclass_holds_what_passed():
    made = Settings(np.float64(1), Path("a") / "b")
    assert made == Settings(1.0, "a/b") and type(made.share) is float
    with pytest.raises(InputError, match="`share` is 2.0; it must lie in .0, 1.. Its default is 0.5"):
        Settings(2)
