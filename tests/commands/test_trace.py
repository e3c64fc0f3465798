"""`draft-opd trace` in the pocket world."""

import json
import shutil

import pytest
from conftest import HELD_OUT, SHIPPED, SHIPPED_PAIR
from readers import data_of

from draft_opd_trl import cli


DRAFTER, OTHER = SHIPPED[0], "other"


def trace(*words):
    options = ["--prompts", HELD_OUT]
    sizes = ["--num_prompts", "2", "--max_new_tokens", "40"]
    return cli.main(["trace", *SHIPPED_PAIR, *options, *sizes, *map(str, words)])


def test_page_and_json_hold_the_same_traces_of_both_drafters(tmp_path, capsys):
    shutil.copytree(DRAFTER, tmp_path / OTHER)
    file = tmp_path / "new" / "trace.html"
    assert trace("--output_file", file, "--compare", tmp_path / OTHER, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    page = data_of(file)
    assert result["file"] == str(file)
    assert list(result["traces"]) == page["drafters"] == [OTHER, DRAFTER.name]
    assert len(page["texts"]) == 2
    first, second = result["traces"].values()
    # The same weights along the same texts.
    assert first == second and len(first[0]["blocks"]) > 3
    for text, one in zip(page["texts"], first, strict=True):
        assert [trace["blocks"][0]["drafts"] for trace in text] == [one["blocks"][0]["drafts"]] * 2
        assert one["prompt"].startswith("<|im_start|>user\n")
    assert "target, temperature 0" in page["about"]


def test_terminal_writes_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trace("--terminal") == 0
    out = capsys.readouterr().out
    assert f"{DRAFTER.name}: τ" in out and "What is 3756+9789?" in out and "recovered" in out
    assert "\x1b" not in out  # no colours where none can be seen
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert trace() == 0
    assert capsys.readouterr().out == "2 texts written to trace.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]


def test_a_drafter_is_not_compared_with_itself(capsys):
    with pytest.raises(SystemExit) as exit_:
        trace("--compare", DRAFTER)
    assert exit_.value.code == 1
    assert "is the drafter of --model itself" in capsys.readouterr().err


def test_drafters_of_one_name_go_by_their_paths(tmp_path, capsys):
    shutil.copytree(DRAFTER, tmp_path / DRAFTER.name)
    assert trace("--compare", tmp_path / DRAFTER.name, "--json", "--terminal") == 0
    names = list(json.loads(capsys.readouterr().out)["traces"])
    assert names == [str(tmp_path / DRAFTER.name), str(DRAFTER)]
