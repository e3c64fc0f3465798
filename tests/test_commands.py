"""What the commands check before they load anything, and what they say."""

import pytest

from draft_opd_trl.cli import main
from draft_opd_trl.commands.evaluate import show


PAIR = ["--model", "drafter", "--teacher", "target"]


def _entry(value):
    return {"value": value, "interval": [value - 0.25, value + 0.25]}


@pytest.fixture
def result():
    measured = {
        "acceptance_length": 3.5,
        "interval": [3.25, 3.75],
        "acceptance_length_per_prompt": _entry(3.75),
        "acceptance_by_slot": [0.75, 0.5],
        "acceptance_by_position": [{"start": 0, "stop": 32, **_entry(3.5)}],
        "blocks_fully_accepted": _entry(0.5),
        "stops_in_blocks": _entry(0.5),
        "seconds": 4.0,
        "draft_seconds": 1.0,
        "verify_seconds": 2.5,
        "tokens_per_second": 100.0,
        "speedup": 2.0,
        "speedup_interval": [1.75, 2.25],
        "texts": {"checked": 8, "changed": 0, "at_ties": 0, "largest_gap": 0.0},
        "resumed": 0,
    }
    one = {"suite": "pocket", "temperature": 0.0, "prompts": 8, "drafters": {"model": measured}, "difference": None}
    return {"definition": "τ: it is defined.", "model": "a/drafter", "results": [one]}


def test_shown_with_definition_and_intervals(result):
    text = show(result)
    assert text.startswith("τ: it is defined.")
    assert "pocket, T = 0, 8 prompts" in text and "model: a/drafter" in text
    assert "3.500 [3.250, 3.750]" in text and "50.0% [25.0%, 75.0%]" in text
    assert "75% 50%" in text and "0–31: 3.50" in text and "2.00 [1.75, 2.25]" in text
    assert "all 8 greedy texts are the target's own" in text
    assert "earlier run" not in text and "compare" not in text


def test_changed_texts_are_shouted(result):
    measured = result["results"][0]["drafters"]["model"]
    measured["texts"] = {"checked": 8, "changed": 2, "at_ties": 1, "largest_gap": 3.5}
    assert "*** NOT LOSSLESS *** 2 of 8 greedy texts differ" in show(result)
    measured["texts"]["at_ties"] = 2
    assert "CHANGED AT TIES: 2 of 8" in show(result) and "NOT LOSSLESS" not in show(result)


def test_two_drafters_are_shown_with_their_difference(result):
    measured = result["results"][0]
    result["compare"], measured["drafters"]["compare"] = "b/drafter", measured["drafters"]["model"]
    measured["difference"] = {"mean": 0.125, "low": -0.5, "high": 0.75}
    measured["drafters"]["model"] = {**measured["drafters"]["model"], "speedup": None, "texts": None, "resumed": 3}
    text = show(result)
    assert "compare: b/drafter" in text and "model − compare: +0.125 τ [-0.500, +0.750]" in text
    assert "3 texts came from an earlier run" in text and text.count("speedup") == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--suite", "pocket", "--suite_path", "gsm8k=x"], "--suite_path gsm8k=x must be name=path of one of"),
        (["--suite", "pocket", "--suite_path", "pocket"], "--suite_path pocket must be name=path of one of"),
        (["--suite", "pocket,gone.jsonl"], "gone.jsonl is not a file here"),
        (["--suite", "pocket", "--temperature", "0", "-1"], "`temperature` is -1.0"),
        (["--suite", "pocket", "--chat_template_kwargs", "{enable_thinking"], "{enable_thinking is not JSON"),
    ],
)
def test_evaluate_checks_before_it_loads_models(words, why, capsys):
    """No such drafter or target exists here, and neither is missed."""
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *PAIR, *words])
    assert exit_.value.code == 1
    assert why in capsys.readouterr().err


def test_train_needs_rows_to_train_on(tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(SystemExit):
        main(["train", *PAIR, "--dataset_name", str(tmp_path / "few.jsonl"), "--output_dir", str(tmp_path / "out")])
    assert "leaves nothing to train on: the data set has 2 rows" in capsys.readouterr().err
