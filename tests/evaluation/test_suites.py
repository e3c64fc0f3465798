"""Evaluation prompts: each benchmark from a small copy in its own schema, the pocket kinds, any data set."""

import json

import pytest
from datasets import Dataset, DatasetDict

from draft_opd_trl.evaluation import suites
from draft_opd_trl.evaluation.suites import POCKET_PROMPTS, SUITES, load_suite


BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
# A row of each data set with all of its columns, and the message it becomes.
ROWS = {
    "gsm8k": ({"question": "How {many}?", "answer": "3 #### 3"}, "How {many}?" + BOXED),
    "math500": (
        {
            "problem": "$x_{1}$?",
            "solution": "s",
            "answer": "a",
            "subject": "Algebra",
            "level": 2,
            "unique_id": "test/1.json",
        },
        "$x_{1}$?" + BOXED,
    ),
    "aime25": ({"problem": "Find it.", "answer": "42", "id": "0"}, "Find it." + BOXED),
    "mbpp": (
        {
            "source_file": "f",
            "task_id": 2,
            "prompt": "Write a function.",
            "code": "c",
            "test_imports": [],
            "test_list": ["t"],
        },
        "Write a function.",
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/0",
            "prompt": "def f():\n",
            "canonical_solution": "s",
            "test": "t",
            "entry_point": "f",
        },
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\ndef f():\n\n```",
    ),
    "mt-bench": (
        {"category": "writing", "prompt": ["First?", "Second?"], "reference": [], "prompt_id": 81},
        "First?",
    ),
    "swe-bench-lite": (
        {
            "repo": "a/b",
            "instance_id": "a__b-1",
            "base_commit": "c",
            "patch": "p",
            "test_patch": "t",
            "problem_statement": "It breaks.",
            "hints_text": "",
            "created_at": "2023",
            "version": "1",
            "FAIL_TO_PASS": "[]",
            "PASS_TO_PASS": "[]",
            "environment_setup_commit": "e",
        },
        "Problem Statement:\nIt breaks.\nPlease fix the issue described above.",
    ),
}


@pytest.mark.parametrize("name", SUITES)
def test_a_row_becomes_the_papers_message(name, tmp_path):
    row, message = ROWS[name]
    Dataset.from_list([row]).to_parquet(tmp_path / "copy.parquet")
    prompts = load_suite(name, str(tmp_path / "copy.parquet"))
    second = {"follow_up": "Second?"} if name == "mt-bench" else {}
    assert prompts.to_list() == [{"prompt": [{"role": "user", "content": message}], **second}]


@pytest.mark.parametrize("form", ["jsonl", "repository", "saved", "saved-dict"])
def test_copies_of_every_form_are_read(form, tmp_path):
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(3)]
    path = tmp_path / "copy"
    if form == "jsonl":
        path = tmp_path / "copy.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "repository":
        # As `hf download` leaves it: the card's header says where each config's splits are.
        (path / "main").mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(path / "main" / "test-00000-of-00001.parquet")
        Dataset.from_list(rows[:1]).to_parquet(path / "main" / "train-00000-of-00001.parquet")
        (path / "README.md").write_text(
            "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
            "  - split: test\n    path: main/test-*\n---\n"
        )
    elif form == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict(train=Dataset.from_list(rows[:1]), test=Dataset.from_list(rows)).save_to_disk(path)
    contents = [prompt[0]["content"] for prompt in load_suite("gsm8k", str(path))["prompt"]]
    assert contents == [f"q{i}{BOXED}" for i in range(3)]


def test_rows_are_drawn_once_and_for_all(tmp_path):
    path = tmp_path / "copy.jsonl"
    path.write_text("".join(json.dumps({"question": str(i), "answer": ""}) + "\n" for i in range(300)))
    drawn = load_suite("gsm8k", str(path))["prompt"]
    assert len(drawn) == 128
    expected = Dataset.from_list([{"i": i} for i in range(300)]).shuffle(seed=0)["i"][:128]
    assert [prompt[0]["content"] for prompt in drawn] == [f"{i}{BOXED}" for i in expected]
    assert list(load_suite("gsm8k", str(path), count=5)["prompt"]) == list(drawn)[:5]


def test_pocket_prompts_by_kind():
    rows = [json.loads(line) for line in POCKET_PROMPTS.read_text().splitlines()]
    assert list(load_suite("pocket", count=5)["prompt"]) == [row["prompt"] for row in rows[:5]]
    sums = load_suite("pocket-sum")
    assert set(sums["kind"]) == {"sum"} and len(sums) > 50
    with pytest.raises(ValueError, match="no suite 'pocket-chess'.*Suites of pocket tasks: .*pocket-sum"):
        load_suite("pocket-chess")


def test_any_data_set_of_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    assert load_suite(str(path), count=2)["prompt"][:] == ["one", "two"]
    assert len(load_suite(str(path))) == 3


def test_without_a_network_the_error_says_what_to_do():
    remedy = r"hf download --repo-type dataset ID --local-dir DIR.*--suite_path gsm8k=DIR.*openai/gsm8k"
    with pytest.raises(FileNotFoundError, match=remedy):
        load_suite("gsm8k")
    with pytest.raises(FileNotFoundError, match="'no/such' is no data set here.*hf download"):
        load_suite("no/such")


def test_wrong_copies_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "other.jsonl"
    path.write_text('{"problem": "x"}\n')
    with pytest.raises(ValueError, match=r"\['problem'\], without 'question', so it is no copy of openai/gsm8k"):
        load_suite("gsm8k", str(path))
    with pytest.raises(FileNotFoundError, match="gone.jsonl is not a file here"):
        load_suite("gsm8k", str(tmp_path / "gone.jsonl"))
    monkeypatch.setattr(suites, "POCKET_PROMPTS", tmp_path / "gone.jsonl")
    with pytest.raises(FileNotFoundError, match="part of the source tree.*--suite_path pocket=FILE"):
        load_suite("pocket")
