"""`draft-opd init`: what it makes and says, and that the command it ends with is one that `train` takes."""

import json
import shlex

import pytest
from conftest import POCKET, save_target, tiny_stopping_model

from draft_opd_trl.cli import CommandParser, main
from draft_opd_trl.commands import train
from draft_opd_trl.commands.init import read_options


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("init")
    save_target(tiny_stopping_model(), place / "my target")
    (place / "prompts.jsonl").write_text('{"prompt": "abc"}\n')
    return place


def words_for(place, out, *words, kind="dflash"):
    return ["init", "--target", str(place / "my target"), "--kind", kind, "--output_dir", str(out), *words]


def test_it_says_what_it_made_and_how_to_train_it(place, tmp_path, capsys):
    assert main(words_for(place, tmp_path / "d0", "--set", "block_size=4", "--json")) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["kind"] == "dflash" and made["num_draft_tokens"] == 3 and made["num_parameters"] > 0
    assert made["mask_token"]["id"] == 32 and "none of the 32 tokens has" in made["mask_token"]["why"]
    assert made["target_layer_ids"] == [2] and made["draft_vocab_size"] == made["vocab_size"] == 48
    runs = []
    for line in made["train"]:
        program, command, *words = shlex.split(line)
        assert (program, command) == ("draft-opd", "train")
        arguments, *_, config, _ = CommandParser("train", train).parse(words)
        assert arguments.teacher_model_name_or_path == str(place / "my target")
        runs.append((arguments.model_name_or_path, config))
    # Untrained: SFT first, on texts that serve Draft-OPD too.
    (first, sft), (second, opd) = runs
    assert first == made["output_dir"] == str(tmp_path / "d0") and second == sft.output_dir
    assert (sft.lmbda, sft.rollout_source, opd.lmbda) == (0, "generate", 1)
    assert sft.text_cache_dir == opd.text_cache_dir


def test_people_read_the_same(place, tmp_path, capsys):
    prompts = str(place / "prompts.jsonl")
    chat = '{"enable_thinking": false}'
    assert main(words_for(place, tmp_path / "d0", "--prompts", prompts, "--chat_template_kwargs", chat)) == 0
    text = capsys.readouterr().out
    assert "a new dflash drafter for" in text and "15 tokens a block" in text and "all 48 tokens" in text
    assert "mask token   32 (no token), a row of the embedding" in text
    assert f"--dataset_name {prompts}" in text and shlex.quote(chat) in text


def test_a_drafter_that_is_copied_is_trained_by_the_defaults(place, tmp_path, capsys):
    main(words_for(place, tmp_path / "d0"))
    capsys.readouterr()
    assert main(words_for(place, tmp_path / "d1", "--from", str(tmp_path / "d0"))) == 0
    text = capsys.readouterr().out
    assert f"a copy of {tmp_path / 'd0'}" in text and text.rstrip().endswith(f"{tmp_path / 'd1'}-opd")
    assert text.count("draft-opd train") == 1 and "--lmbda" not in text


def test_a_public_drafter_and_its_target_as_they_ship(tmp_path, capsys):
    words = ["init", "--target", str(POCKET / "target"), "--output_dir", str(tmp_path / "d0"), "--kind"]
    assert main([*words, "dspark", "--from", str(POCKET / "drafter-dflash"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["mask_token"]["token"] == "<|mask|>" and made["notes"] == []
    assert made["start"] == f"the dflash drafter {POCKET / 'drafter-dflash'}"


def test_options_are_read_as_they_are_written():
    words = ["block_size=4", "enable_confidence_head=false", "target_layer_ids=[0, 2]", "hidden_act=silu"]
    assert read_options([*words, "mask_token_id=<|mask|>", "rope = 1e-6"]) == {
        "block_size": 4,
        "enable_confidence_head": False,
        "target_layer_ids": [0, 2],
        "hidden_act": "silu",
        "mask_token_id": "<|mask|>",
        "rope": 1e-6,
    }


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["--set", "block_size"], 1, "`set` is 'block_size'; it must be name=value, such as block_size=8"),
        (["--set", "block_size=4", "block_size=5"], 1, "--set gives block_size twice. Give it once."),
        (["--set", "blocksize=4"], 1, "no option 'blocksize'. Did you mean 'block_size'?"),
        (["--form", "d0"], 2, "unknown option --form. Did you mean --from?"),
        (["--num_prompts", "0"], 1, "`num_prompts` is 0; it must lie in [1,"),
        (["--chat_template_kwargs", "{on"], 1, "`chat_template_kwargs` is '{on', which is not JSON"),
    ],
)
def test_a_mistake_is_told_in_one_line(words, code, why, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words_for(place, tmp_path / "d0", *words))
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("draft-opd: error: ")]
    assert exit_.value.code == code and out == "" and len(told) == 1 and why in told[0], err
    assert not (tmp_path / "d0").exists()
