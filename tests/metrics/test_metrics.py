"""The `evaluate` metric: loaded from the package's folder, by hand, and equal to the report and to a recount."""

import configparser
import random
from pathlib import Path

import evaluate
import pytest
from conftest import ROOT, random_prompts

from draft_opd_trl.decoding.acceptance import AcceptanceReport
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.measure import measure_acceptance
from draft_opd_trl.metrics import metric_path


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(metric_path())


@pytest.fixture(scope="module")
def block_metric():
    return evaluate.load(metric_path(), "blocks")


def test_by_hand(metric, block_metric):
    # Blocks at 0, 2, 3 and 7 of a text of 9 tokens commit 2, 1, 4 and 1; the other's only block ends its text.
    expected = {
        "acceptance_length": 9 / 5,
        "acceptance_length_per_text": (8 / 4 + 1) / 2,
        "committed": 9,
        "verifications": 5,
    }
    by_slot = [4 / 5, 1 / 3, 1 / 3]
    texts, lengths = [[1, 0, 3, 1], [1], []], [9, 2, 1]
    result = metric.compute(predictions=texts, references=lengths, num_draft_tokens=3)
    assert result.pop("acceptance_by_slot") == pytest.approx(by_slot) and result == pytest.approx(expected)
    blocks = [
        [{"anchor": anchor, "num_accepted": run} for anchor, run in zip([0, 2, 3, 7], texts[0], strict=True)],
        [{"anchor": 0, "num_accepted": 1}],
        [],
    ]
    result = block_metric.compute(predictions=blocks, references=lengths, num_draft_tokens=3)
    assert result.pop("acceptance_by_slot") == pytest.approx(by_slot) and result == pytest.approx(expected)
    # Any choice of blocks, and any origin of the count.
    chosen = [[{"anchor": 103, "num_accepted": 3}]]
    assert block_metric.compute(predictions=chosen, references=[109])["acceptance_length"] == 4


def test_batches_add_up(metric):
    metric.add_batch(predictions=[[1, 0, 3, 1]], references=[9])
    metric.add(prediction=[1], reference=2)
    assert metric.compute()["acceptance_length"] == pytest.approx(9 / 5)
    assert metric.compute(predictions=[[]], references=[1])["acceptance_length"] == 0


def test_agrees_with_the_report_on_random_texts(metric):
    draws, width = random.Random(0), 5
    texts, runs = [], []
    for _ in range(200):
        length, anchor, accepted = draws.randint(1, 40), 0, []
        while anchor < length - 1:
            accepted.append(draws.randint(0, min(width, length - 1 - anchor)))
            anchor += accepted[-1] + 1
        texts.append([0] * length)
        runs.append(accepted)
    report = AcceptanceReport(width, texts, runs, [True] * len(texts), 1.0)
    result = metric.compute(predictions=runs, references=[len(text) for text in texts], num_draft_tokens=width)
    assert result["acceptance_length"] == pytest.approx(report.acceptance_length, abs=1e-12)
    assert result["acceptance_length_per_text"] == pytest.approx(report.statistic("acceptance_length_per_prompt"))
    assert result["acceptance_by_slot"] == pytest.approx(report.acceptance_by_slot)
    assert result["committed"] == sum(report.committed)


def test_agrees_with_decoding(metric, block_metric, qwen_target, qwen_drafter):
    """The same number from the report's runs, from the blocks of the rollout, and from the trainer's metrics."""
    prompts, settings = random_prompts(6, seed=3), SpeculationSettings(20, [3, 9], batch_size=4)
    report = measure_acceptance(qwen_target, qwen_drafter, prompts, settings)
    rollout = speculate(qwen_target, qwen_drafter, prompts, settings)
    blocks = [[] for _ in prompts]
    for row, anchor, accepted in zip(
        *(getattr(rollout.blocks, name).tolist() for name in ("texts", "anchors", "num_accepted")), strict=True
    ):
        blocks[row].append({"anchor": anchor, "num_accepted": accepted})
    width = qwen_drafter.num_draft_tokens
    lengths = [len(text) for text in report.completions]
    first = metric.compute(predictions=report.accepted, references=lengths, num_draft_tokens=width)
    second = block_metric.compute(predictions=blocks, references=rollout.lengths.tolist(), num_draft_tokens=width)
    assert first == second
    logged = report.metrics()
    assert first["acceptance_length"] == pytest.approx(logged["eval_acceptance_length"], abs=1e-12)
    for slot, share in enumerate(first["acceptance_by_slot"], start=1):
        assert share == pytest.approx(logged[f"eval_acceptance_slot_{slot}"])


@pytest.mark.parametrize(
    ("runs", "length", "message"),
    [
        ([1, 0, 3], 12, "Text 0 has 12 tokens, but its accepted runs .* make 8"),
        ([1, 0, 3], 6, "Text 0 has 6 tokens"),
        ([], 4, "Text 0 has 4 tokens"),
        ([2, -1, 3], 7, "cannot accept -1"),
    ],
)
def test_counts_that_cannot_be_are_refused(metric, runs, length, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[runs], references=[length])


def test_other_configurations_are_refused():
    with pytest.raises(ValueError, match="no configuration 'words'"):
        evaluate.load(metric_path(), "words")


def test_its_example_runs(metric):
    """The docstring's, which is also the card's."""
    example = metric.inputs_description.split(">>> ")[-1].splitlines()
    assert str(eval(example[0], {"metric": metric})) == example[1].strip()
    card = Path(metric_path(), "README.md").read_text()
    result = metric.compute(predictions=[[1, 0, 3, 1], [1]], references=[9, 2], num_draft_tokens=3)
    for name, value in result.items():
        shown = value if not isinstance(value, list) else [round(share, 3) for share in value]
        assert f'"{name}": {shown}' in card


def test_the_package_ships_it():
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    shipped = metadata["options.package_data"]["draft_opd_trl"].split()
    assert {"metrics/*/*.py", "metrics/*/*.md"} <= set(shipped)
