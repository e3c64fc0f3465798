"""The recipes in the package: each is read by the parser, says what it is for, and one goes the whole way."""

import json

import pytest
import yaml
from conftest import POCKET

from draft_opd_trl.cli import CommandParser, main
from draft_opd_trl.commands import train
from draft_opd_trl.commands.recipes import recipes


NAMES = list(recipes())
SHAPES = ("qwen3-4b", "qwen3-8b", "llama-3.1-8b", "gemma3")


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_recipe_is_one_and_says_what_it_may(name, tmp_path):
    needed = ["--model", "d", "--teacher", "t", "--dataset_name", "p", "--output_dir", str(tmp_path)]
    parsed = CommandParser("train", train).parse(["--config", name, *needed])
    given = yaml.safe_load(recipes()[name].read_text())
    for option, value in given.items():
        found = next(getattr(one, option) for one in parsed if hasattr(one, option))
        if option != "teacher_model_name_or_path":  # which the command line gave
            assert found == value, option
    parsed[0].sft_config(parsed[3], parsed[2].use_peft)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_whom_it_is_for_and_how_it_is_called(name):
    text = recipes()[name].read_text()
    first, *comment = [line for line in text.splitlines() if line.startswith("#")]
    assert first.endswith(".") and len(first) < 121
    assert any(f"draft-opd train --config {name} " in line for line in comment)
    assert ("# Not run:" in text) == (name in SHAPES)


def test_they_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES) and "A public drafter gone stale" in listed
    assert main(["recipes", "stale_drafter"]) == 0
    assert capsys.readouterr().out == recipes()["stale_drafter"].read_text()
    assert main(["recipes", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["recipes"]) == NAMES


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["recipes", "stale_draftr"], "There is no recipe 'stale_draftr'.*Did you mean stale_drafter?"),
        (["train", "--config", "stale_draftr"], "not a file here, nor a recipe.*Did you mean stale_drafter?"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(words, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert all(part in error for part in told.split(".*"))


def test_a_recipe_goes_the_whole_way_on_the_pocket_world(tmp_path, capsys):
    prompts = (POCKET / "prompts" / "quickstart.jsonl").read_text().splitlines()[:20]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    words = ["train", "--config", "new_drafter", "--model", POCKET / "drafter-dflash-narrow"]
    words += ["--teacher", POCKET / "target", "--dataset_name", tmp_path / "prompts.jsonl"]
    words += ["--output_dir", tmp_path / "out", "--disable_tqdm", "true", "--num_eval_prompts", 4]
    words += ["--max_completion_length", 16, "--sft_epochs", 0, "--sft_steps", 1, "--max_steps", 1, "--json"]
    assert main([str(word) for word in words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompts"] == 4 and set(result["serve"]) == {"vLLM", "SGLang"}
    assert len(result["gains"]) == 3 and (tmp_path / "out" / "trace.html").is_file()
