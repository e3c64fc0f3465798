"""Acceptance counted by replay is that of speculation: block for block without draws, in distribution with them."""

import json

import pytest
import torch
from conftest import ANY_KIND, random_prompts, tiny_drafter, tiny_model
from invariants import same_law_p

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation import by_replay
from draft_opd_trl.evaluation.by_replay import measure_by_replay
from draft_opd_trl.evaluation.measure import evaluate_drafters, measure_acceptance, text_seeds


def test_greedy_counts_are_those_of_speculation(target, drafter):
    prompts, settings = random_prompts(7, seed=3), SpeculationSettings(20, [3, 9], batch_size=3)
    told = []
    got = measure_by_replay(target, drafter, prompts, settings, range(7), on_text=lambda *text: told.append(text))
    expected = measure_acceptance(target, drafter, prompts, settings)
    assert (got.completions, got.accepted, got.stopped) == (expected.completions, expected.accepted, expected.stopped)
    assert [index for index, _ in told] == list(range(7))
    assert [report.accepted[0] for _, report in told] == expected.accepted


@pytest.mark.parametrize("drawn", [False, True], ids=["argmax", "drawn"])
def test_counts_of_drawn_texts_have_the_distribution_of_speculation(drawn):
    target = Target(tiny_model("qwen3"))
    drafter = tiny_drafter(ANY_KIND, target).init_from_target(target)
    prompts, seeds = [[5, 6, 7]] * 1200, text_seeds(0, range(1200))
    settings = SpeculationSettings(6, [], SamplingParams(0.7), drawn, batch_size=200)
    got = measure_by_replay(target, drafter, prompts, settings, seeds)
    # Of other texts: both draw a text's tokens from the same numbers.
    expected = measure_acceptance(target, drafter, prompts, settings, seeds=text_seeds(1, range(1200)))

    def histogram(report):
        return torch.bincount(torch.tensor([sum(runs) for runs in report.accepted]), minlength=6)

    assert histogram(got)[1:].sum() > 100
    assert same_law_p(histogram(got), histogram(expected)) > 1e-3


def test_texts_are_written_once_for_all_drafters(monkeypatch):
    target = Target(tiny_model("qwen3"))
    drafters = {"one": tiny_drafter(ANY_KIND, target), "two": tiny_drafter(ANY_KIND, target, seed=2)}
    written = []
    monkeypatch.setattr(
        by_replay, "speculate", lambda *args, **options: written.append(args[2]) or speculate(*args, **options)
    )
    prompts, settings = random_prompts(4, seed=3), SpeculationSettings(12, [3], batch_size=2)
    found = evaluate_drafters(target, drafters, prompts, settings, replay=True)
    assert len(written) == 2
    for name, drafter in drafters.items():
        alone = measure_by_replay(target, drafter, prompts, settings, text_seeds(0, range(4)))
        assert found["drafters"][name]["acceptance_length"] == alone.acceptance_length


def test_results_say_how_they_were_made(tmp_path):
    target = Target(tiny_model("lfm2"))
    drafters = {"one": tiny_drafter(ANY_KIND, target), "two": tiny_drafter(ANY_KIND, target, seed=2)}
    prompts, settings = random_prompts(4, seed=3), SpeculationSettings(12, [3], batch_size=2)
    found = evaluate_drafters(target, drafters, prompts, settings, results=tmp_path / "r", replay=True)
    one = found["drafters"]["one"]
    assert found["plain"] is None and one["speedup"] is None
    assert one["replayed"] and "tokens_per_second" not in one and "draft_seconds" not in one
    again = evaluate_drafters(target, drafters, prompts, settings, results=tmp_path / "r", replay=True)
    assert again["drafters"]["one"]["resumed"] == 4
    assert json.dumps(again["difference"]) == json.dumps(found["difference"])
    with pytest.raises(ValueError, match="by was 'replay'"):
        evaluate_drafters(target, drafters, prompts, settings, results=tmp_path / "r", baseline=False)
