"""The comparison of kinds: its recipes are settings of their own, and gains are told seed by seed."""

import importlib
import json

import pytest
from conftest import ROOT


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    return importlib.import_module("kinds")


def test_its_recipes_are_settings_of_their_own(kinds):
    args, build = kinds.KindsArguments(), importlib.import_module("recipes").StudyConfig
    for temperature, recipes in kinds.ROWS.items():
        made = [
            build("unused", temperature=temperature, report_to="none", **args.options(temperature, recipe))
            for recipe in recipes
        ]
        losses = [one.losses.accepted for one in made]
        told = {(one.lmbda, loss.kind, one.sample_proposals) for one, loss in zip(made, losses, strict=True)}
        assert len(told) == len(recipes)
        assert {how[0] for how in args.measures(temperature, {}).values()} == {temperature}


def _runs(kinds, recipes, first):
    """Seed 1 is one tenth better than seed 0, and each recipe one fifth than the one before."""
    return [
        {"recipe": recipe, "rate": 0.1, "seed": seed, "steps": 5, "seconds": 2.0}
        | {"tau": dict.fromkeys(kinds.ways_of(0.0), first * 1.2**place * (1 + seed / 10))}
        for place, recipe in enumerate(recipes)
        for seed in (0, 1)
    ]


def test_what_is_told_of_two_kinds(kinds):
    recipes = (kinds.SFT, kinds.DEFAULT, kinds.EQUAL_TIME)
    found = {name: {0.0: _runs(kinds, recipes, first)} for name, first in (("one", 4.0), ("other", 5.0))}
    times = {"one": {"draft": 0.002, "verify": 0.004, "K": 7}, "other": {"draft": 0.003, "verify": 0.004, "K": 8}}
    tables, summary = kinds.told(found, times, {"one": {0.0: 1.5}, "other": {0.0: 1.25}})
    gained = {"opd": 0.2, "opd_equal_time": 1 / 1.2 - 1}
    assert summary["one_t0"] == pytest.approx(gained)
    assert summary["other_t0"] == pytest.approx(gained | {"sft_over_first": 0.25, "opd_over_first": 0.25})
    assert summary["block_ms"] == pytest.approx({"one": 2.0, "other": 3.0})
    assert (
        "| other | default recipe | 5 | 6.300 ± 0.424 | +20.0% [" in tables[0]
        and "| 8 | 3.00 | 4.00 | 1.25 |" in tables[-1]
    )


def test_the_page_has_the_tables_of_the_results(kinds):
    source = ROOT / "docs" / "source"
    kept = json.loads((source / "results" / "kinds.json").read_text(encoding="utf-8"))
    runs, costs = (
        {name: {float(t): found for t, found in by_world.items()} for name, by_world in kept[part].items()}
        for part in ("runs", "step_costs")
    )
    times = {name: spent for name, spent in kept["blocks"].items() if name in runs}
    tables, _ = kinds.told(runs, times, costs)
    page = (source / "benchmarks_kinds.md").read_text(encoding="utf-8")
    lines = [line for table in tables for line in table.splitlines() if line.startswith("|")]
    assert [line for line in lines if line not in page] == [] and len(lines) > 30
