"""Acceptance length by hand from scripted decoding, by slot, with its bootstrap interval."""

import pytest
import torch
from conftest import ScriptedDrafter, counting_target, random_prompts

from draft_opd_trl.evaluation import AcceptanceReport, bootstrap_interval, measure_acceptance, merge_reports, report_of
from draft_opd_trl.records import DraftBlocks, Rollout
from draft_opd_trl.speculation import SpeculationSettings, speculate


def _report(committed, verifications):
    return AcceptanceReport(committed, verifications, [1], [2], 2.0, sum(committed) + len(committed), [])


def _scripted():
    """Right but for slot 2 after 2 and slot 1 after 4, in a world that counts."""
    proposals = (torch.arange(12)[:, None] + torch.arange(1, 4)) % 12
    proposals[2, 1], proposals[4, 0] = 5, 6
    return ScriptedDrafter(proposals)


def test_acceptance_by_hand():
    report = measure_acceptance(counting_target(), _scripted(), [[1], [9]], SpeculationSettings(9, [11]))
    # [1] → 2 | 3 4 | 5 | 6 7 8 9 | 10: after the prefill's 2 come 2, 1, 4 and 1 tokens. [9] → 10 | 11: the stop token.
    assert report.completions == [list(range(2, 11)), [10, 11]]
    assert report.committed == [8, 1]
    assert report.verifications == [4, 1]
    assert report.acceptance_length == pytest.approx(9 / 5)
    # Accepted runs 1, 0, 3, 1 of 3, 3, 3, 1 judged slots; then 1 of 1.
    assert report.accepted_by_slot == [4, 1, 1]
    assert report.valid_by_slot == [5, 3, 3]
    assert report.acceptance_by_slot == pytest.approx([4 / 5, 1 / 3, 1 / 3])
    assert report.tokens == 11
    assert report.seconds > 0


def test_a_text_of_one_token_counts_in_neither():
    rollout = Rollout.from_ids([[1], [1]], [[2], [2, 3]])
    rollout.blocks = DraftBlocks(*(torch.tensor(value) for value in ([1], [1], [[3]], [1], [1])))
    report = report_of(rollout, 1.0)
    assert report.committed == [0, 1] and report.verifications == [0, 1]
    assert report.acceptance_length == 1


def test_summary_and_metrics_by_hand():
    report = AcceptanceReport([6, 3], [2, 1], [2, 1], [3, 2], 2.0, 11, [[1], [2]])
    assert report.tokens_per_second == 5.5
    assert report.summary() == {
        "acceptance_length": 3.0,
        "acceptance_by_slot": [2 / 3, 0.5],
        "prompts": 2,
        "verifications": 3,
        "tokens": 11,
        "seconds": 2.0,
        "tokens_per_second": 5.5,
    }
    assert report.metrics("test") == {
        "test_acceptance_length": 3.0,
        "test_tokens_per_second": 5.5,
        "test_runtime": 2.0,
        "test_prompts": 2,
        "test_acceptance_slot_1": 2 / 3,
        "test_acceptance_slot_2": 0.5,
    }


def test_nothing_verified_is_zero():
    assert _report([0], [0]).acceptance_length == 0


def test_reports_of_ranks_are_one():
    merged = merge_reports([_report([4], [2]), _report([2, 3], [1, 2])])
    assert merged.committed == [4, 2, 3] and merged.verifications == [2, 1, 2]
    assert merged.accepted_by_slot == [2] and merged.valid_by_slot == [4]
    assert merged.acceptance_length == pytest.approx(9 / 5)
    assert merged.seconds == 2.0 and merged.tokens == 12


def test_measured_acceptance_is_a_recount_of_the_record(target, drafter):
    prompts, settings = random_prompts(6, seed=3), SpeculationSettings(20, [], batch_size=4)
    report = measure_acceptance(target, drafter, prompts, settings, progress="counting")
    rollout = speculate(target, drafter, prompts, settings)
    assert report.completions == rollout.completions()
    blocks = rollout.blocks
    verifications, committed, accepted = [0] * 6, [0] * 6, [0] * drafter.num_draft_tokens
    for row, count, valid in zip(
        blocks.rows.tolist(), blocks.num_accepted.tolist(), blocks.num_valid.tolist(), strict=True
    ):
        verifications[row] += 1
        # The token after the accepted run, unless the text ended with the run.
        room = int(rollout.lengths[row]) - int(rollout.prompt_lengths[row]) - 1 - committed[row]
        committed[row] += min(count + 1, room)
        assert valid <= drafter.num_draft_tokens
        for slot in range(count):
            accepted[slot] += 1
    assert report.verifications == verifications
    assert report.committed == committed == [19] * 6
    assert report.accepted_by_slot == accepted
    assert report.acceptance_length == pytest.approx(sum(committed) / sum(verifications))


def test_bootstrap_of_a_report_against_itself_is_nothing():
    report = _report([4, 9, 2, 7], [2, 3, 2, 2])
    assert bootstrap_interval(report, report) == (0.0, 0.0)


def test_bootstrap_of_equal_prompts_is_a_point():
    assert bootstrap_interval(_report([6] * 5, [2] * 5)) == (3.0, 3.0)
    assert bootstrap_interval(_report([6] * 5, [2] * 5), _report([4] * 5, [2] * 5)) == (1.0, 1.0)


def test_bootstrap_contains_the_estimate_and_pairs():
    first = _report([10, 2, 8, 3, 12, 4, 9, 2], [2] * 8)
    second = _report([9, 1, 7, 2, 11, 3, 8, 1], [2] * 8)
    low, high = bootstrap_interval(first)
    assert low < first.acceptance_length < high and high - low > 1
    # Prompts differ a lot, the drafters by exactly half a token on each.
    assert bootstrap_interval(first, second) == (0.5, 0.5)
    assert bootstrap_interval(first, level=0.5)[1] < high
    assert bootstrap_interval(first, seed=1) == bootstrap_interval(first, seed=1)


def test_bootstrap_needs_the_same_prompts():
    with pytest.raises(ValueError, match="A paired difference needs the same prompts, not 1 and 2"):
        bootstrap_interval(_report([1], [1]), _report([1, 2], [1, 1]))
