"""Rows of prompts from files and folders, or what is wrong with them: which file, which line, what to do."""

import json

import pytest
from datasets import Dataset, DatasetDict

from draft_opd_trl.core.errors import InputError, NotFoundError
from draft_opd_trl.texts import rows
from draft_opd_trl.texts.rows import hold_out, load_prompts


ROWS = [{"prompt": "a"}, {"prompt": "b\u2028c"}]  # a line's end to Unicode, and none to JSON
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", LINES), ("x.json", LINES), ("x.json", json.dumps(ROWS))])
def test_files_that_are_right(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_prompts(str(tmp_path / name)).to_list() == ROWS


def test_folders_that_are_right(tmp_path):
    made = Dataset.from_list(ROWS)
    made.to_parquet(tmp_path / "data" / "x.parquet")
    made.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "both")
    for name in ("data/x.parquet", "data", "saved", "both"):
        assert load_prompts(str(tmp_path / name)).to_list() == ROWS, name
    assert load_prompts(str(tmp_path / "both"), split="test").to_list() == ROWS[1:]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b"", "is empty. Give a file with a row a line"),
        ("x.jsonl", b"\n \n", "holds nothing but blanks"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', r"line 2 is not JSON .*: '\{\"prompt\": \"b\"'. Mend it"),
        ("x.jsonl", b'{"prompt": "a"}\n\n"b"\n', "line 3 holds 'b', and a row is a JSON object"),
        ("x.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 is not JSON .'prompt' stands there twice"),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}', "line 2 is not UTF-8 .*Save it as UTF-8"),
        ("x.json", b'[{"prompt": "a"},', "is one JSON list with a fault"),
        ("x.json", b'[{"prompt": "a"}, 7]', "row 2 holds 7, and a row is"),
        ("x.json", b"[]", "holds no rows|cannot be read as rows"),
        ("x.parquet", b"hello", "is no Parquet file .*Give one that is"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}/{name}.*{words}") as raised:
        load_prompts(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_folders_that_are_wrong(tmp_path, monkeypatch):
    with pytest.raises(NotFoundError, match="gone.jsonl is not a file here"):
        load_prompts(str(tmp_path / "gone.jsonl"))
    (tmp_path / "notes.md").touch()
    with pytest.raises(NotFoundError, match="is a folder without data files .*.csv"):
        load_prompts(str(tmp_path))
    monkeypatch.setattr(rows, "MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.csv").touch()
    with pytest.raises(InputError, match="holds more than 3 files, so it is not taken for a data set"):
        load_prompts(str(tmp_path))
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(InputError, match="looks like a folder of `save_to_disk`, but cannot be read"):
        load_prompts(str(tmp_path))


def test_saved_folders_that_hold_other_rows(tmp_path):
    made = Dataset.from_list(ROWS)
    DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(InputError, match="has no split 'tset'. Name one of train, test"):
        load_prompts(str(tmp_path / "both"), split="tset")
    made.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="none (holds no rows|looks like a folder of `save_to_disk`, but)"):
        load_prompts(str(tmp_path / "none"))


def test_rows_held_out_are_the_seeds_and_none_are_lost():
    made = Dataset.from_dict({"prompt": list("abcdefgh")})
    kept, held = hold_out(made, 3, seed=1)
    assert sorted([*kept["prompt"], *held["prompt"]]) == list("abcdefgh") and len(held) == 3
    assert hold_out(made, 3, seed=1)[1]["prompt"][:] == held["prompt"][:]
    assert any(hold_out(made, 3, seed)[1]["prompt"][:] != held["prompt"][:] for seed in (2, 3, 4))
    assert hold_out(made, 0, seed=1) == (made, None)
    with pytest.raises(InputError, match="Holding 8 prompts out for evaluation leaves nothing to train on"):
        hold_out(made, 8, seed=1)
    with pytest.raises(InputError, match=r"`num_eval_prompts` is -1; it must lie in \[0,"):
        hold_out(made, -1, seed=1)
