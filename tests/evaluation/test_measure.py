"""Acceptance measured by decoding: a recount of the record, plain decoding, times, texts that changed."""

import json
import time

import pytest
import torch
from conftest import ANY_KIND, ScriptedDrafter, counting_target, random_prompts, tiny_drafter, tiny_model

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.acceptance import bootstrap_interval
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation import measure, results
from draft_opd_trl.evaluation.measure import (
    changed_texts,
    evaluate_drafters,
    fingerprint,
    measure_acceptance,
    text_seeds,
)


def _scripted():
    """Right but for slot 2 after 2 and slot 1 after 4, in a world that counts."""
    proposals = (torch.arange(12)[:, None] + torch.arange(1, 4)) % 12
    proposals[2, 1], proposals[4, 0] = 5, 6
    return ScriptedDrafter(proposals)


def test_acceptance_by_hand():
    report = measure_acceptance(counting_target(), _scripted(), [[1], [9]], SpeculationSettings(9, [11]))
    # [1] → 2 | 3 4 | 5 | 6 7 8 9 | 10: after the prefill's 2 come 2, 1, 4 and 1 tokens. [9] → 10 | 11: the stop token.
    assert report.completions == [list(range(2, 11)), [10, 11]]
    assert report.accepted == [[1, 0, 3, 1], [1]]
    assert report.stopped == [False, True]
    assert report.committed == [8, 1]
    assert report.acceptance_length == pytest.approx(9 / 5)
    # Accepted runs 1, 0, 3, 1 of 3, 3, 3, 1 judged slots; then 1 of 1.
    assert report.acceptance_by_slot == pytest.approx([4 / 5, 1 / 3, 1 / 3])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_measured_acceptance_is_a_recount_of_the_record(target, drafter, temperature):
    """Against the blocks of the rollout: written in another place, and clipped another way."""
    prompts, stops = random_prompts(6, seed=3), [3, 9]
    settings = SpeculationSettings(20, stops, SamplingParams(temperature), batch_size=4)

    def generator():
        return torch.Generator().manual_seed(1)

    report = measure_acceptance(target, drafter, prompts, settings, generator(), progress="counting")
    rollout = speculate(target, drafter, prompts, settings, generator())
    assert report.completions == rollout.completions()
    assert report.stopped == [text[-1] in stops for text in report.completions]
    blocks = rollout.blocks
    rows, slots = blocks.texts.tolist(), range(drafter.num_draft_tokens)
    assert report.accepted == [
        [run for row, run in zip(rows, blocks.num_accepted.tolist(), strict=True) if row == prompt]
        for prompt in range(6)
    ]
    assert report.committed == (rollout.completion_lengths - 1).tolist()
    assert report.acceptance_length == pytest.approx(sum(report.committed) / len(blocks))
    for slot, share in zip(slots, report.acceptance_by_slot, strict=True):
        accepted, valid = (blocks.num_accepted > slot).sum(), (blocks.num_valid > slot).sum()
        assert share == pytest.approx(int(accepted) / max(int(valid), 1))
    assert report.statistic("blocks_fully_accepted") == pytest.approx(1 - blocks.has_error.float().mean().item())
    offsets = blocks.anchors - rollout.prompt_lengths[blocks.texts]
    assert torch.equal(report._blocks["anchors"], offsets)


def test_texts_are_handed_out_as_they_end():
    target, drafter, prompts = counting_target(), _scripted(), [[1], [9], [3], [7]]
    seen = []
    settings = SpeculationSettings(9, [11], batch_size=2)
    whole = measure_acceptance(target, drafter, prompts, settings, on_text=lambda *text: seen.append(text))
    # [9] ends in the first round, long before [1] does.
    assert seen[0][0] == 1 and sorted(prompt for prompt, _ in seen) == [0, 1, 2, 3]
    for prompt, report in seen:
        assert report.completions == [whole.completions[prompt]] and report.accepted == [whole.accepted[prompt]]
    assert sum(report.seconds for _, report in seen) == pytest.approx(whole.seconds)
    assert sum(report.verify_seconds for _, report in seen) == pytest.approx(whole.verify_seconds)


def test_plain_decoding_is_measured_alike():
    plain = measure_acceptance(counting_target(), None, [[1], [9]], SpeculationSettings(4, [11]))
    assert plain.completions == [[2, 3, 4, 5], [10, 11]]
    assert plain.acceptance_length == 1 and plain.draft_seconds == 0 and plain.tokens_per_second > 0


def test_time_is_told_apart(monkeypatch):
    """A drafter that sleeps while it proposes, a target that sleeps longer: each shows up in its own account."""
    target, drafter = counting_target(), _scripted()
    propose, forward = drafter.propose, target.forward_cached
    calls = {"draft": 0, "verify": 0}

    def sleepy(name, function, seconds):
        def call(*args, **kwargs):
            calls[name] += 1
            time.sleep(seconds)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(drafter, "propose", sleepy("draft", propose, 0.02))
    monkeypatch.setattr(target, "forward_cached", sleepy("verify", forward, 0.04))
    report = measure_acceptance(target, drafter, [[1]], SpeculationSettings(9, []))
    assert calls == {"draft": 4, "verify": 5}  # the prefill is one more
    assert 0.08 <= report.draft_seconds <= 0.15
    assert 0.20 <= report.verify_seconds <= 0.35
    assert report.draft_seconds + report.verify_seconds <= report.seconds


def test_unchanged_texts_are_counted_as_such(qwen_target, qwen_drafter, prompts):
    settings = SpeculationSettings(12, [], batch_size=3)
    plain, report = (measure_acceptance(qwen_target, d, prompts, settings) for d in (None, qwen_drafter))
    expected = {"checked": len(prompts), "changed": 0, "at_ties": 0, "largest_gap": 0.0}
    assert changed_texts(qwen_target, prompts, plain, report) == expected


def test_a_changed_text_is_found_with_its_gap():
    """Another token where the target is sure, and one where two logits are equal."""
    target = counting_target()
    plain = measure_acceptance(target, None, [[1], [3]], SpeculationSettings(5, []))
    other = measure_acceptance(target, None, [[1], [3]], SpeculationSettings(5, []))
    other.completions[1] = [4, 5, 9, 10, 11]
    result = changed_texts(target, [[1], [3]], plain, other)
    assert result == {"checked": 2, "changed": 1, "at_ties": 0, "largest_gap": pytest.approx(10.0, rel=1e-4)}


def test_a_tie_of_bfloat16_is_counted_apart():
    model = tiny_model("qwen3").to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[7] = model.lm_head.weight[5]
    target, settings = Target(model), SpeculationSettings(1, [])
    plain = measure_acceptance(target, None, [[1, 2]], settings)
    plain.completions, other = [[5]], measure_acceptance(target, None, [[1, 2]], settings)
    other.completions = [[7]]
    expected = {"checked": 1, "changed": 1, "at_ties": 1, "largest_gap": 0.0}
    assert changed_texts(target, [[1, 2]], plain, other) == expected


def _settings(temperature=0.0, **options):
    return SpeculationSettings(16, [3, 9], SamplingParams(temperature), batch_size=3, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_two_drafters_are_measured_on_the_same_prompts(qwen_target, qwen_drafter, prompts, temperature, tmp_path):
    other = tiny_drafter(qwen_drafter.kind, qwen_target, seed=5)
    drafters = {"trained": qwen_drafter, "fresh": other}
    result = evaluate_drafters(qwen_target, drafters, prompts, _settings(temperature), 7, results=tmp_path / "tiny")
    assert json.loads(json.dumps(result)) == result
    reports = [
        measure_acceptance(qwen_target, drafter, prompts, _settings(temperature), seeds=text_seeds(7, range(7)))
        for drafter in drafters.values()
    ]
    for (name, entry), report in zip(result["drafters"].items(), reports, strict=True):
        assert entry["acceptance_length"] == report.acceptance_length, name
        assert entry["acceptance_by_slot"] == report.acceptance_by_slot
        assert entry["interval"] == list(bootstrap_interval(report))
        assert entry["speedup"] == entry["tokens_per_second"] / result["plain"]["tokens_per_second"]
        assert entry["speedup_interval"] is None  # side by side, texts share their seconds
        assert entry["texts"] == (
            {"checked": 7, "changed": 0, "at_ties": 0, "largest_gap": 0.0} if temperature == 0 else None
        )
    low, high = bootstrap_interval(*reports)
    mean = reports[0].acceptance_length - reports[1].acceptance_length
    assert result["difference"] == {"mean": mean, "low": low, "high": high}
    texts = [f"tiny-{name}.jsonl" for name in ("fresh", "plain", "trained")]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*texts, "tiny.md", "tiny.png"]


def test_a_speedup_has_an_interval_where_texts_are_decoded_alone(tmp_path):
    settings, target = SpeculationSettings(9, [], batch_size=1), Target(tiny_model("qwen3"))
    drafters = {"one/two": tiny_drafter(ANY_KIND, target)}
    result = evaluate_drafters(target, drafters, [[1], [3], [5]], settings, results=tmp_path / "x")
    entry = result["drafters"]["one/two"]
    assert entry["speedup_interval"][0] <= entry["speedup"] <= entry["speedup_interval"][1]
    assert (tmp_path / "x-one-two.jsonl").is_file()  # a path as a name makes no folders


class Killed(Exception):
    pass


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_kill_loses_at_most_the_texts_in_flight(
    qwen_target, qwen_drafter, prompts, tmp_path, monkeypatch, temperature
):
    """
    Killed while the drafter's fourth text is being kept; what was kept is not decoded again, and what was under way
    becomes the very text that it would have been.
    """
    settings, drafters = _settings(temperature), {"trained": qwen_drafter}
    whole = evaluate_drafters(qwen_target, drafters, prompts, settings, results=tmp_path / "whole")
    kept = results.ResultsFile.append
    count = 0

    def append(self, prompt, report):
        nonlocal count
        count += 1
        if count == len(prompts) + 4:
            raise Killed
        kept(self, prompt, report)

    monkeypatch.setattr(results.ResultsFile, "append", append)
    with pytest.raises(Killed):
        evaluate_drafters(qwen_target, drafters, prompts, settings, results=tmp_path / "run")
    monkeypatch.setattr(results.ResultsFile, "append", kept)
    decoded = []
    measured = measure.measure_acceptance

    def counted(target, drafter, waiting, *rest, **options):
        decoded.append(len(waiting))
        return measured(target, drafter, waiting, *rest, **options)

    monkeypatch.setattr(measure, "measure_acceptance", counted)
    again = evaluate_drafters(qwen_target, drafters, prompts, settings, results=tmp_path / "run")
    assert decoded == [len(prompts) - 3]
    assert again["plain"]["resumed"] == len(prompts) and again["drafters"]["trained"]["resumed"] == 3
    timed = ("seconds", "draft_seconds", "verify_seconds", "tokens_per_second")
    timed += ("speedup", "speedup_interval", "resumed")
    same = [{k: v for k, v in run["drafters"]["trained"].items() if k not in timed} for run in (whole, again)]
    assert same[0] == same[1]

    def texts(name):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()[1:]]
        return {line["prompt"]: (line["completion"], line["accepted"]) for line in lines}

    for drafter in ("plain", "trained"):
        assert texts(f"run-{drafter}.jsonl") == texts(f"whole-{drafter}.jsonl")


def test_results_of_other_weights_or_laws_are_refused(qwen_target, qwen_drafter, prompts, tmp_path):
    def evaluate(drafter, settings):
        return evaluate_drafters(qwen_target, {"one": drafter}, prompts, settings, 0, False, tmp_path / "run")

    assert evaluate(qwen_drafter, _settings())["plain"] is None
    other = tiny_drafter(qwen_drafter.kind, qwen_target, seed=5)
    with pytest.raises(ValueError, match="other settings: drafter was"):
        evaluate(other, _settings())
    with pytest.raises(ValueError, match="batch_size was 3 and is 4"):
        evaluate(qwen_drafter, SpeculationSettings(16, [3, 9], batch_size=4))


def test_fingerprints_tell_weights_apart(qwen_target, qwen_drafter):
    before = fingerprint(qwen_drafter)
    assert before == fingerprint(qwen_drafter)
    parameter = list(qwen_drafter.parameters())[-1]
    with torch.no_grad():
        kept = parameter.view(-1)[0].item()
        parameter.view(-1)[0] = kept + 1e-3
    assert fingerprint(qwen_drafter) != before
    with torch.no_grad():
        parameter.view(-1)[0] = kept
