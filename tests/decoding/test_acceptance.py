"""Counting by hand what verification said: τ, by slot, by position, stops, and intervals over prompts."""

import pytest

from draft_opd_trl.decoding.acceptance import AcceptanceReport, bootstrap_interval, join_reports, speedup_interval


def _report(committed, verifications):
    """Texts with these sums: every block but the last is rejected at once."""
    texts, accepted = [], []
    for tokens, blocks in zip(committed, verifications, strict=True):
        texts.append(list(range(tokens + 1)))
        accepted.append([0] * (blocks - 1) + [tokens - blocks] if blocks else [])
    return AcceptanceReport(64, texts, accepted, [False] * len(texts), 2.0)


@pytest.fixture
def report():
    """
    K = 3. First text, 10 tokens: runs 1, 0, 3 and then a run of 1 that ends at the limit. Second, 4 tokens: all 3
    proposals accepted, the last being the stop token. Third: the prefill's token stops it. Fourth, 3 tokens: run 1,
    then the stop token comes from verification.
    """
    return AcceptanceReport(
        3,
        [list(range(10)), [1, 2, 3, 4], [4], [5, 6, 4]],
        [[1, 0, 3, 1], [3], [], [1]],
        [False, True, True, True],
        seconds=3.0,
        draft_seconds=1.0,
        verify_seconds=1.5,
    )


def test_lengths_by_hand(report):
    # Anchors of the first text: 0, 2, 3, 7; it commits 2, 1, 4 and 2 tokens, its last block having room for 2.
    assert report.committed == [9, 3, 0, 2]
    assert report.verifications == [4, 1, 0, 1]
    assert report.acceptance_length == pytest.approx(14 / 6)
    assert len(report) == 4 and report.tokens == 18 and report.tokens_per_second == 6.0


def test_mean_over_prompts_by_hand(report):
    assert report.statistic("acceptance_length_per_prompt") == pytest.approx((9 / 4 + 3 / 1 + 2 / 1) / 3)


def test_slots_by_hand(report):
    # Judged slots: 3, 3, 3, 2 | 3 | 2.
    assert report.acceptance_by_slot == pytest.approx([5 / 6, 2 / 6, 2 / 4])


def test_whole_blocks_and_stops_by_hand(report):
    # The third of the first text, and the second text's.
    assert report.statistic("blocks_fully_accepted") == pytest.approx(2 / 6)
    # Three texts ended with a stop token, one of them inside a run.
    assert report.statistic("stops_in_blocks") == pytest.approx(1 / 3)


def test_positions_by_hand():
    # K = 40: blocks at 0, 31, 32, 73, 74; those bins are doubled that are needed.
    long = AcceptanceReport(40, [list(range(80))], [[30, 0, 40, 0, 5]], [False], 1.0)
    assert long.position_bins == [(0, 32), (32, 64), (64, 128)]
    by_position = [long.statistic(f"acceptance_length_from_{start}") for start in (0, 32, 64)]
    assert by_position == pytest.approx([(31 + 1) / 2, 41 / 1, (1 + 5) / 2])


def test_plain_decoding_is_one_token_a_verification():
    plain = AcceptanceReport(0, [[5, 6, 7]], [[0, 0]], [True], 1.0)
    assert plain.acceptance_length == 1 and plain.acceptance_by_slot == []


def test_nothing_verified_is_zero():
    empty = AcceptanceReport(2, [[4], [4]], [[], []], [True, True], 1.0)
    assert empty.acceptance_length == 0 and empty.position_bins == []
    assert empty.summary()["acceptance_by_slot"] == [0, 0]


def test_metrics_and_summary_are_the_same_numbers(report):
    metrics, summary = report.metrics("test"), report.summary()
    assert metrics["test_acceptance_length"] == summary["acceptance_length"] == report.acceptance_length
    assert [metrics["test_acceptance_length_low"], metrics["test_acceptance_length_high"]] == summary["interval"]
    assert tuple(summary["interval"]) == bootstrap_interval(report)
    assert [metrics[f"test_acceptance_slot_{slot}"] for slot in (1, 2, 3)] == summary["acceptance_by_slot"]
    assert len(summary["intervals_by_slot"]) == 3
    for name in ("acceptance_length_per_prompt", "blocks_fully_accepted", "stops_in_blocks"):
        assert metrics[f"test_{name}"] == summary[name]["value"]
        low, high = summary[name]["interval"]
        assert low <= summary[name]["value"] <= high
    assert summary["acceptance_by_position"] == [
        {"start": 0, "stop": 32, "value": report.acceptance_length, "interval": summary["interval"]}
    ]
    assert metrics["test_acceptance_length_from_0"] == report.acceptance_length
    assert metrics["test_runtime"] == summary["seconds"] == 3.0
    for name, value in {"tokens_per_second": 6.0, "draft_seconds": 1.0, "verify_seconds": 1.5, "prompts": 4}.items():
        assert metrics[f"test_{name}"] == summary[name] == value
    assert summary["verifications"] == 6 and summary["tokens"] == 18


def test_joined_reports_count_all_texts(report):
    after = join_reports([report, report])
    assert after.committed == report.committed * 2 and after.acceptance_length == report.acceptance_length
    assert (after.seconds, after.draft_seconds, after.verify_seconds) == (6.0, 2.0, 3.0)
    at_once = join_reports([report, report], at_once=True)
    assert at_once.tokens == 36 and at_once.seconds == 3.0


def test_bootstrap_of_a_report_against_itself_is_nothing():
    report = _report([4, 9, 2, 7], [2, 3, 2, 2])
    assert bootstrap_interval(report, report) == (0.0, 0.0)


def test_bootstrap_of_equal_prompts_is_a_point():
    assert bootstrap_interval(_report([6] * 5, [2] * 5)) == (3.0, 3.0)
    assert bootstrap_interval(_report([6] * 5, [2] * 5), _report([4] * 5, [2] * 5)) == (1.0, 1.0)


def test_bootstrap_contains_the_estimate_and_pairs():
    first = _report([10, 2, 8, 3, 12, 4, 9, 2], [2] * 8)
    second = _report([11, 3, 9, 4, 13, 5, 10, 3], [2] * 8)
    low, high = bootstrap_interval(first)
    assert low < first.acceptance_length < high and high - low > 1
    # Prompts differ a lot, the drafters by exactly half a token on each.
    assert bootstrap_interval(first, second) == (-0.5, -0.5)
    assert bootstrap_interval(first, level=0.5)[1] < high
    assert bootstrap_interval(first, seed=1) == bootstrap_interval(first, seed=1)


def test_bootstrap_covers_as_it_says():
    """Of intervals over samples from a known law, about 95 % contain its mean."""
    import random

    draws, inside = random.Random(0), 0
    for _ in range(200):
        blocks = [draws.choice([4, 8]) for _ in range(40)]
        tokens = [sum(draws.choice([1, 5]) for _ in range(count)) for count in blocks]
        low, high = bootstrap_interval(_report(tokens, blocks), resamples=200)
        inside += low <= 3.0 <= high
    assert 180 <= inside <= 198


def test_speedup_by_hand():
    def texts(seconds):
        return [AcceptanceReport(3, [[0] * 10 * length], [[]], [False], seconds * length) for length in (1, 2, 5)]

    assert speedup_interval(texts(0.1), texts(0.3)) == pytest.approx((3.0, 3.0))
    slow = [*texts(0.1)[:2], AcceptanceReport(3, [[0] * 50], [[]], [False], 2.5)]
    low, high = speedup_interval(slow, texts(0.3))
    assert low == pytest.approx(0.6) and high == pytest.approx(3.0)  # only the slow text, and never


def test_bootstrap_needs_the_same_prompts():
    with pytest.raises(ValueError, match="A paired difference needs the same prompts, not 1 and 2"):
        bootstrap_interval(_report([1], [1]), _report([1, 2], [1, 1]))
