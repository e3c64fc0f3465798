"""The second turn: after the target's own answer, the same for all drafters, and resumed after a kill."""

import json

import pytest
from conftest import HELD_OUT, POCKET, SHIPPED_PAIR, tiny_drafter, tiny_model
from datasets import Dataset
from transformers import AutoTokenizer

from draft_opd_trl import SpeculationSettings, Target, evaluate_drafters, speculate
from draft_opd_trl.cli import main
from draft_opd_trl.core.errors import InputError
from draft_opd_trl.evaluation.suites import load_suite
from draft_opd_trl.evaluation.turns import second_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POCKET / "target")


def _asked(text):
    return [{"role": "user", "content": text}]


def test_a_second_prompt_holds_the_answer_to_the_first(tokenizer):
    suite = Dataset.from_list([{"prompt": _asked("What is 1+2?"), "follow_up": "What is 3+4?"}])
    answer = tokenizer("It is 3.", add_special_tokens=False)["input_ids"]
    (ids,) = second_prompts(suite, [[*answer, tokenizer.eos_token_id]], tokenizer)
    conversation = [*_asked("What is 1+2?"), {"role": "assistant", "content": "It is 3."}, *_asked("What is 3+4?")]
    assert ids == tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "What is 1+2?", "follow_up": "And 3?"}, "needs messages"),
        ({"prompt": _asked("What is 1+2?"), "follow_up": None}, "second turn of row 0"),
    ],
)
def test_rows_that_cannot_be_asked_twice_say_so(tokenizer, row, why):
    with pytest.raises(InputError, match=why):
        second_prompts(Dataset.from_list([row]), [[]], tokenizer)


@pytest.mark.parametrize("baseline", [True, False])
def test_all_runs_are_asked_the_same_and_both_turns_count(baseline, prompts):
    target = Target(tiny_model("qwen3"))
    drafters = {name: tiny_drafter("dflash", target, seed) for name, seed in (("one", 1), ("two", 2))}
    settings = SpeculationSettings(6, [0])
    given = []

    def ask_again(completions):
        given.append(completions)
        return [[*prompt, *completion, 1] for prompt, completion in zip(prompts, completions, strict=True)]

    measured = evaluate_drafters(target, drafters, prompts, settings, baseline=baseline, ask_again=ask_again)
    own = speculate(target, None, prompts, settings).completions()
    assert given == [own]
    later = speculate(target, None, ask_again(own), settings).completions()
    assert measured["prompts"] == 2 * len(prompts)
    assert {drafter["tokens"] for drafter in measured["drafters"].values()} == {sum(map(len, own + later))}
    if baseline:
        assert [drafter["texts"]["changed"] for drafter in measured["drafters"].values()] == [0, 0]


def test_mt_bench_is_asked_twice_and_goes_on_after_a_kill(tmp_path, capsys):
    questions = [prompt[0]["content"] for prompt in load_suite(HELD_OUT, count=4)["prompt"]]
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(json.dumps({"prompt": questions[row : row + 2]}) + "\n" for row in (0, 2)))
    words = ["--suite", "mt-bench", "--suite_path", f"mt-bench={copy}", "--max_new_tokens", "24", "--json"]
    folder = tmp_path / "results"

    def evaluate():
        assert main(["evaluate", *SHIPPED_PAIR, *words, "--output_dir", str(folder)]) == 0
        (measured,) = json.loads(capsys.readouterr().out)["results"]
        (drafter,) = measured["drafters"].values()
        return measured["prompts"], drafter

    count, whole = evaluate()
    assert (count, whole["texts"]["checked"], whole["texts"]["changed"], whole["resumed"]) == (4, 4, 0, 0)
    (file,) = (file for file in folder.glob("mt-bench-t0-turn-2-*.jsonl") if "plain" not in file.name)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2
    file.write_text("".join(lines[:-1]) + lines[-1][:20])
    count, resumed = evaluate()
    assert (count, resumed["resumed"], file.read_text().count("\n")) == (4, 3, 3)
    assert resumed["acceptance_length"] == whole["acceptance_length"]
