"""Rounds are timed as speculation runs them, and nothing of the drafter stays changed."""

import json
from types import SimpleNamespace

import pytest
from conftest import random_prompts, tiny_drafter, tiny_model

from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate, verify
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.evaluation import round_costs
from draft_opd_trl.evaluation.measure import evaluate_drafters
from draft_opd_trl.evaluation.round_costs import (
    ROUNDS,
    WARM_UP,
    check_timed,
    proposing,
    round_seconds,
    serving_choices,
)


SETTINGS = SpeculationSettings(8, [3], batch_size=2)
FREE = [kind for kind, drafter in DRAFTERS.items() if drafter.config_class.free_length]


@pytest.fixture
def target():
    return Target(tiny_model("qwen3"))


def test_every_text_takes_part_in_every_round(target, monkeypatch):
    seen = []
    monkeypatch.setattr(round_costs, "verify", lambda *args: seen.append(args[1].block.shape) or verify(*args))
    drafter = tiny_drafter("eagle3", target)
    assert round_seconds(target, drafter, random_prompts(5, seed=1), SETTINGS) > 0
    assert seen == [(5, drafter.num_draft_tokens + 1)] * (ROUNDS + WARM_UP)
    seen.clear()
    assert round_seconds(target, None, random_prompts(3, seed=1), SETTINGS) > 0
    assert seen == [(3, 1)] * (ROUNDS + WARM_UP)


@pytest.mark.parametrize("kind", FREE)
def test_with_fewer_proposals_a_chain_begins_the_same(target, kind):
    drafter, prompts = tiny_drafter(kind, target), random_prompts(4, seed=2)
    own = drafter.num_draft_tokens
    whole = speculate(target, drafter, prompts, SETTINGS)
    with proposing(drafter, 1):
        short = speculate(target, drafter, prompts, SETTINGS)
    assert drafter.num_draft_tokens == own > 1
    assert short.completions() == whole.completions() and short.blocks.num_draft_tokens == 1
    proposals = {
        (text, anchor): first
        for text, anchor, first in zip(
            *(part.tolist() for part in (whole.blocks.texts, whole.blocks.anchors, whole.blocks.draft_tokens[:, 0])),
            strict=True,
        )
    }
    places = list(zip(short.blocks.texts.tolist(), short.blocks.anchors.tolist(), strict=True))
    shared = [place for place in places if place in proposals]
    assert len(shared) >= len(prompts)
    found = dict(zip(places, short.blocks.draft_tokens[:, 0].tolist(), strict=True))
    assert [found[place] for place in shared] == [proposals[place] for place in shared]


def test_no_round_is_timed_where_each_reads_its_texts_anew():
    anew = SimpleNamespace(reads_anew="its cache is inexact")
    check_timed(anew, [])
    with pytest.raises(ValueError, match=r"serve_batch_sizes=\[8\] asks for rounds to be timed.*Leave it out"):
        check_timed(anew, [8])


def test_an_evaluation_says_what_to_serve_with(target, tmp_path):
    drafter, prompts = tiny_drafter("eagle3", target), random_prompts(3, seed=1)
    found = evaluate_drafters(
        target, {"one": drafter}, prompts, SETTINGS, results=tmp_path / "r", baseline=False, serve_batch_sizes=[1, 2]
    )
    told = found["drafters"]["one"]["serving"]
    assert [one["batch_size"] for one in told] == [1, 2] and json.loads(json.dumps(told)) == told
    for one in told:
        by_k = {choice["num_draft_tokens"]: choice for choice in one["choices"]}
        assert sorted(by_k) == list(range(drafter.num_draft_tokens + 1))
        assert one["speedup"] == max(choice["speedup"] for choice in one["choices"]) >= 1
    assert "to serve with at batch 2" in (tmp_path / "r.md").read_text()


def test_each_length_that_an_engine_may_be_told_is_judged(target, monkeypatch):
    timed = []

    def seconds(target, drafter, prompts, settings):
        timed.append((len(prompts), 0 if drafter is None else drafter.num_draft_tokens))
        return 1.0 + timed[-1][1] * len(prompts)

    monkeypatch.setattr(round_costs, "round_seconds", seconds)
    by_slot = [0.5, 0.25, 0.125, 0.0, 0.0, 0.0, 0.0]
    chain = tiny_drafter("eagle3", target)
    own = chain.num_draft_tokens
    told = serving_choices(target, chain, random_prompts(2, seed=0), SETTINGS, by_slot[:own], [1, 4])
    assert sorted(timed) == [(size, k) for size in (1, 4) for k in range(own + 1)]
    assert [choice.num_draft_tokens for choice in told[4]] == list(range(own + 1))
    assert told[4][1].speedup == pytest.approx(1.5 / 5)
    timed.clear()
    block = tiny_drafter("dflash", target)
    serving_choices(target, block, random_prompts(2, seed=0), SETTINGS, [0.5] * block.num_draft_tokens, [3])
    assert timed == [(3, 0), (3, block.num_draft_tokens)]
