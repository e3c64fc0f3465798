"""`draft-opd texts` on what the pocket target served, and what it checks before that is loaded."""

import json
import sys

import pytest
from conftest import POCKET
from datasets import load_dataset
from transformers import AutoTokenizer

from draft_opd_trl.cli import main
from draft_opd_trl.commands import texts
from draft_opd_trl.evaluation.suites import load_suite
from draft_opd_trl.texts.harvest import SEEN, STRANGE
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.traffic import FAILED


TARGET = str(POCKET / "target")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log of 16 prompts, answered in at most 40 tokens."""
    sys.path.insert(0, str(POCKET))
    try:
        from traffic import Server, traffic
    finally:
        sys.path.remove(str(POCKET))
    rows = (POCKET / "prompts" / "quickstart.jsonl").read_text().splitlines()[:16]
    lines = traffic([json.loads(row)["prompt"] for row in rows], Server(40))
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    return file


def test_a_log_becomes_rows_to_train_and_evaluate_on(log, tmp_path, capsys):
    output = tmp_path / "new" / "rows.jsonl"
    words = ["texts", str(log), "--target", TARGET, "--output_file", str(output), "--held_out", "2"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    dropped = {reason: entry["count"] for reason, entry in result["dropped"].items()}
    assert (dropped[SEEN], dropped[FAILED], dropped["no JSON object"]) == (2, 2, 1)
    # Two lines of eight are another law's; of the target's own, one or two may be other tokens when read again.
    assert 1 <= dropped[STRANGE] <= 4
    assert result["lines"] == 19 and result["answers"] == 18  # two of them of earlier turns, and two failed requests
    assert result["rows"] + result["held_out_rows"] == result["answers"] - dropped[SEEN] - dropped[STRANGE]
    assert result["held_out_rows"] >= 2 and result["cut_short"] >= 2
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = load_dataset("json", data_files=str(output), split="train")
    assert len(tokenize_dataset(rows, tokenizer, None, needs_completions=True)) == result["rows"]
    assert max(map(len, rows["prompt_ids"])) == result["longest_prompt"]
    assert max(map(len, rows["completion_ids"])) == result["longest_completion"] == 40
    suite = load_suite(result["held_out_file"])
    assert len(tokenize_dataset(suite, tokenizer, None)) == result["held_out_rows"]
    assert not {*map(tuple, rows["prompt_ids"])} & {*map(tuple, suite["prompt_ids"])}
    shown = texts.show(result)
    assert f"{result['rows']} rows written to {output}" in shown and "dropped: seen already" in shown
    assert "--rollout_source dataset --max_prompt_length" in shown and "are the target's greedy choice" in shown


def _error(capsys, *words):
    with pytest.raises(SystemExit) as exit_:
        main(["texts", *map(str, words)])
    assert exit_.value.code == 1
    err = capsys.readouterr().err
    return err[err.index("draft-opd: error: ") :]


@pytest.mark.parametrize(
    ("lines", "options", "said"),
    [
        (None, {}, "log.jsonl is not a file here"),
        ("", {}, "no answers in there (no lines)"),
        ('{"question": "x"}\n', {}, "log.jsonl:1 is of no known form (has the keys question)"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', {}, "log.jsonl:1 is without an answer"),
        ('{"prompt": "a", "completion": "b"}', {"output_file": "rows.parquet"}, "does not end in .jsonl"),
        ('{"prompt": "a", "completion": "b"}', {"output_file": "log.jsonl"}, "is one of the logs"),
        ('{"prompt": "a", "completion": "b"}', {"temperature": -1}, "`temperature` is -1.0"),
        ('{"prompt": "a", "completion": "b"}', {"held_out": -1}, "`held_out` is -1"),
        ('{"prompt": "a", "completion": "b"}', {"target": "nowhere"}, "target 'nowhere' is no folder here"),
    ],
)
def test_what_is_wrong_is_said_before_the_target_is_loaded(lines, options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("draft_opd_trl.training.loading.read_target", None)
    if lines is not None:
        (tmp_path / "log.jsonl").write_text(lines)
    given = {"target": TARGET, "output_file": "rows.jsonl", **options}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    assert said in _error(capsys, "log.jsonl", *words)


def test_nothing_is_written_where_nothing_is_left(log, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    words = ("--target", TARGET, "--output_file", output)
    assert "conversations out leaves nothing to train on" in _error(capsys, log, *words, "--held_out", 1000)
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(
        '{"prompt": [{"role": "user", "content": "Hi"}], "response": "I am another model, and glad."}\n'
    )
    said = _error(capsys, foreign, *words)
    assert f"Of 1 answers none can be trained on (1 {STRANGE})" in said and "--temperature" in said
    assert list(tmp_path.iterdir()) == [foreign]
