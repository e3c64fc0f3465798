"""The study of recipes: every recipe is a valid setting of its own, and figures are paired by seed."""

import importlib
import json
from dataclasses import asdict

import pytest
from conftest import ROOT

from draft_opd_trl import DraftOPDConfig


BENCHMARKS = ROOT / "examples" / "benchmarks"


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("recipes")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_recipe_is_valid_and_unlike_the_others(recipes, temperature):
    settings = {}
    for recipe, options in recipes.variants(temperature).items():
        config = recipes.StudyConfig("unused", temperature=temperature, report_to="none", **options)
        settings[recipe] = json.dumps([asdict(config), recipes.ADAMW.get(recipe)], default=str)
    same = {text: [recipe for recipe in settings if settings[recipe] == text] for text in settings.values()}
    assert all(len(names) == 1 for names in same.values()), same.values()


def test_the_papers_recipe_is_the_papers_preset(recipes):
    """But for what all recipes of the study share."""
    arms = importlib.import_module("arms")
    ours = recipes.StudyConfig("unused", report_to="none", **recipes.variants(0.0)[recipes.PAPER])
    theirs = DraftOPDConfig("unused", report_to="none", recipe="paper")
    names = set(arms.THE_PAPERS) - arms.SHARED
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_a_control_is_the_packages_recipe(recipes):
    arms = importlib.import_module("arms")
    for temperature, names in arms.CONTROLS.items():
        for name in set(names) & set(arms.RECIPES):
            given = recipes.variants(temperature)[name]
            ours = recipes.StudyConfig("unused", temperature=temperature, report_to="none", **given)
            theirs = DraftOPDConfig(
                "unused",
                temperature=temperature,
                report_to="none",
                recipe=arms.RECIPES[name],
                accepted_loss=ours.accepted_loss,
            )
            own = asdict(ours) | {"recipe": arms.RECIPES[name]}
            differing = {key for key, value in asdict(theirs).items() if own[key] != value}
            assert not differing - {"run_name", "logging_dir"}, (name, differing)


def test_what_only_the_study_turns_reaches_the_rooms(recipes):
    config = recipes.StudyConfig("unused", report_to="none", whole_blocks=True)
    assert config.streams.whole_blocks and not DraftOPDConfig("unused", report_to="none").streams.whole_blocks


def _result(recipe, seed, tau, rate=0.1, **more):
    ways = {"T = 0": tau, "T = 1, argmax": tau / 2, "T = 1, drawn": tau / 4}
    return {"recipe": recipe, "rate": rate, "seed": seed, "steps": 5, "seconds": 2.0, "tau": ways | more}


def test_gains_are_paired_by_seed(recipes):
    results = [_result(recipes.SFT, 0, 4.0), _result(recipes.SFT, 1, 2.0)]
    results += [_result(recipes.DEFAULT, 1, 3.0), _result(recipes.DEFAULT, 0, 5.0)]
    assert recipes.gain(results, recipes.DEFAULT, recipes.SFT, 0.0) == pytest.approx((0.25 + 0.5) / 2)
    assert sorted(recipes.paired(results, recipes.DEFAULT, 0.0)) == [1.0, 1.0]
    # At T = 1 each arm is read at its better way of proposing.
    drawn = [_result(recipes.SFT, 0, 4.0), _result(recipes.DEFAULT, 0, 4.0, **{"T = 1, drawn": 3.0})]
    assert recipes.gain(drawn, recipes.DEFAULT, recipes.SFT, 1.0) == pytest.approx(0.5)


def test_the_table_keeps_other_rates_apart(recipes):
    results = [_result(recipes.SFT, 0, 4.0), _result(recipes.SFT, 1, 4.5), _result(recipes.DEFAULT, 0, 5.0)]
    results.append(_result(recipes.SFT, 0, 3.0, rate=0.2))
    lines = recipes.table(results, 0.0).splitlines()
    assert len(lines) == 2 + 3
    assert "4.250 ± 0.354" in lines[2] and "+1.000" in lines[3]
    assert "rate 0.2" in lines[4] and "-1.000" in lines[4]


def test_another_study_in_the_same_folder_is_refused(recipes, tmp_path):
    recipes.Study(recipes.StudyArguments(output_dir=str(tmp_path), workers=1))
    recipes.Study(recipes.StudyArguments(output_dir=str(tmp_path), workers=2, temperatures=[1.0]))
    with pytest.raises(SystemExit, match="another study"):
        recipes.Study(recipes.StudyArguments(output_dir=str(tmp_path), steps=7))


def test_finished_runs_are_read_and_not_made_again(recipes, tmp_path):
    study = recipes.Study(recipes.StudyArguments(output_dir=str(tmp_path)))
    job = (0.0, recipes.SFT, 0.002, 0, 5)
    result = _result(recipes.SFT, 0, 4.0)
    file = study.file(*job)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    assert study.results([job], "test") == [result]


def test_the_headline_is_paired_and_null_where_not_run(recipes):
    taus = {recipes.SFT: (4.0, 2.0), recipes.AUF: (4.4, 2.1), recipes.DPACE: (4.2, 2.6), recipes.DEFAULT: (5.0, 3.0)}
    runs = [_result(name, seed, tau) for name, pair in taus.items() for seed, tau in enumerate(pair)]
    found = recipes.headline({0.0: {"every seed": runs}})
    assert found["auf_gain_t0"] == pytest.approx((0.1 + 0.05) / 2)
    assert found["dpace_gain_t0"] == pytest.approx((0.05 + 0.3) / 2)
    # D-PACE's mean is the highest of the controls that were run.
    assert found["opd_over_best_control_t0"] == pytest.approx((5 / 4.2 + 3 / 2.6) / 2 - 1)
    assert found["gain_t0"] == pytest.approx((0.25 + 0.5) / 2)
    absent = ("gain_t0_equal_time", "paper_gain_t0", "gain_t1", "opd_over_best_control_t1")
    assert [found[name] for name in absent] == [None] * 4
