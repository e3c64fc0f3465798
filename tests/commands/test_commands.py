"""What the commands check before they load anything, and what they say."""

import pytest
from conftest import HELD_OUT, SHIPPED_PAIR

from draft_opd_trl.cli import main
from draft_opd_trl.commands.evaluate import show
from draft_opd_trl.commands.options import drafters_by_name


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
        "replayed": False,
        "draft_seconds": 1.0,
        "verify_seconds": 2.5,
        "tokens_per_second": 100.0,
        "speedup": 2.0,
        "speedup_interval": [1.75, 2.25],
        "texts": {"checked": 8, "changed": 0, "at_ties": 0, "largest_gap": 0.0},
        "resumed": 0,
    }
    one = {"suite": "pocket", "temperature": 0.0, "prompts": 8, "drafters": {"drafter": measured}, "difference": None}
    return {"definition": "τ: it is defined.", "drafters": {"drafter": "a/drafter"}, "results": [one]}


def test_shown_with_definition_and_intervals(result):
    text = show(result)
    assert text.startswith("τ: it is defined.")
    assert "pocket, T = 0, 8 prompts" in text and "drafter: a/drafter" in text
    assert "3.500 [3.250, 3.750]" in text and "50.0% [25.0%, 75.0%]" in text
    assert "75% 50%" in text and "0–31: 3.50" in text and "2.00 [1.75, 2.25]" in text
    assert "all 8 greedy texts are the target's own" in text
    assert "earlier run" not in text and "paired" not in text


def test_what_to_serve_with_is_shown_where_it_was_asked_for(result):
    assert "to serve with" not in show(result)
    told = [{"batch_size": 1, "num_draft_tokens": 2, "speedup": 1.75}, {"batch_size": 32, "num_draft_tokens": 0}]
    result["results"][0]["drafters"]["drafter"]["serving"] = told
    text = " ".join(show(result).split())
    assert "batch 1: K = 2 (1.75 times plain); batch 32: no drafter; foreseen from rounds timed here" in text


def test_counts_of_replay_are_shown_without_speeds(result):
    measured = result["results"][0]["drafters"]["drafter"]
    measured |= {"replayed": True, "speedup": None, "texts": None}
    del measured["tokens_per_second"], measured["draft_seconds"], measured["verify_seconds"]
    text = show(result)
    assert "by replay, along texts that the target wrote alone" in text and "3.500 [3.250, 3.750]" in text
    assert "tokens/s" not in text and "speedup" not in text


def test_changed_texts_are_shouted(result):
    measured = result["results"][0]["drafters"]["drafter"]
    measured["texts"] = {"checked": 8, "changed": 2, "at_ties": 1, "largest_gap": 3.5}
    assert "*** NOT LOSSLESS *** 2 of 8 greedy texts differ" in show(result)
    measured["texts"]["at_ties"] = 2
    assert "CHANGED AT TIES: 2 of 8" in show(result) and "NOT LOSSLESS" not in show(result)


def test_two_drafters_are_shown_with_their_difference_under_their_names(result):
    measured = result["results"][0]
    result["drafters"]["before"], measured["drafters"]["before"] = "b/before", measured["drafters"]["drafter"]
    measured["difference"] = {"mean": 0.125, "low": -0.5, "high": 0.75}
    other = {**measured["drafters"]["drafter"], "speedup": None, "texts": None, "resumed": 3}
    measured["drafters"]["drafter"] = other
    text = show(result)
    assert "before: b/before" in text and "drafter − before: +0.125 τ [-0.500, +0.750]" in text
    assert "3 texts came from an earlier run" in text and text.count("speedup") == 1
    measured["drafters"]["before"]["speedup_interval"] = None
    assert "2.00 over decoding without a drafter, without an interval" in show(result)


def test_drafters_go_by_the_names_of_their_folders(tmp_path, monkeypatch):
    assert drafters_by_name(["runs/a/checkpoint-10", "z-lab/Qwen3-4B-DFlash-b16"]) == {
        "checkpoint-10": "runs/a/checkpoint-10",
        "Qwen3-4B-DFlash-b16": "z-lab/Qwen3-4B-DFlash-b16",
    }
    assert list(drafters_by_name(["a/final", "b/final"])) == ["a/final", "b/final"]
    assert list(drafters_by_name(["a/plain"])) == ["a/plain"]  # which decoding without a drafter is called
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert drafters_by_name(["."]) == {"mine": "."}
    with pytest.raises(ValueError, match="--compare a is the drafter of --model itself"):
        drafters_by_name(["a", "a"])


@pytest.mark.parametrize(
    ("words", "said"),
    [([], "nothing was kept. With --output_dir"), (["--output_dir", "kept"], "what had ended is in kept. The same")],
)
def test_ctrl_c_says_how_to_go_on(words, said, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("draft_opd_trl.evaluation.measure.measure_acceptance", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *SHIPPED_PAIR, "--suite", HELD_OUT, "--num_prompts", "2", *words])
    assert exit_.value.code == 130 and said in capsys.readouterr().err


def test_texts_beyond_the_context_are_found_before_decoding(capsys):
    words = ["--suite", HELD_OUT, "--num_prompts", "2"]
    for command in ("evaluate", "trace"):
        with pytest.raises(SystemExit):
            main([command, *SHIPPED_PAIR, *words, "--max_new_tokens", "100000"])
        assert "100000 of a completion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--suite", "pocket", "--suite_path", "gsm8k=x"], "--suite_path gsm8k=x must be name=path of one of"),
        (["--suite", "pocket", "--suite_path", "pocket"], "--suite_path pocket must be name=path of one of"),
        (["--suite", "pocket,gone.jsonl"], "gone.jsonl is not a file here"),
        (["--suite", "pocket", "--temperature", "0", "-1"], "`temperature` is -1.0"),
        (
            ["--suite", "pocket", "--server_url", "http://x", "--serve_batch_sizes", "1", "8"],
            "serve_batch_sizes=[1, 8] asks for rounds to be timed here, beside --server_url. Drop one of them",
        ),
        (["--suite", "pocket", "--serve_batch_sizes", "0"], "`serve_batch_sizes` is 0"),
        (["--suite", "pocket", "--chat_template_kwargs", "{on"], "`chat_template_kwargs` is '{on', which is not JSON"),
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
