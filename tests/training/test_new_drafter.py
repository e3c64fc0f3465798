"""New drafters: whole, fitting, started as is said; and what is refused before weights are read."""

import json
import shutil

import pytest
import torch
from conftest import (
    KINDS,
    STOPS,
    TRAVELLING,
    save_target,
    tiny_drafter,
    tiny_model,
    tiny_stopping_model,
    tiny_tokenizer,
)

from draft_opd_trl.core.target import Target
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.folders.checkpoints import load_drafter
from draft_opd_trl.training.new_drafter import new_drafter


ROWS = len(tiny_tokenizer())
# Kinds whose vocabulary may be smaller than the target's, and a small one that is usual.
COUNTING = [kind for kind in KINDS if DRAFTERS[kind].config_class.usual_draft_vocab_size]
# What a kind cannot be made without.
NEEDED = {kind: {} if kind in TRAVELLING else {"num_hidden_layers": 1} for kind in KINDS}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A target, prompts for it, and a deeper target."""
    place = tmp_path_factory.mktemp("new")
    save_target(tiny_stopping_model(), place / "target")
    save_target(tiny_stopping_model(num_hidden_layers=10), place / "deep")
    rows = [{"prompt": [{"role": "user", "content": "ab" + "c" * count}]} for count in range(6)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def made_at(place, kind, out, target="target", **given):
    options = {**NEEDED[kind], **given.pop("options", {})} if "from_drafter" not in given else given.pop("options", {})
    made = new_drafter(str(place / target), kind, str(out), options=options, **given)
    return made, load_drafter(str(out))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_drafter_is_whole_fits_and_starts_from_the_target(kind, place, tmp_path):
    made, read = made_at(place, kind, tmp_path / "new")
    target = Target(tiny_stopping_model())
    read.bind(target)
    assert read.kind == kind and "the target's last layers" in made.start and made.notes == []
    shape = {"num_hidden_layers": read.config.num_hidden_layers}
    started = DRAFTERS[kind].made_for(target, **shape, **({"mask_token_id": ROWS} if made.mask_token else {}))
    same = [name for name, value in started.state_dict().items() if torch.equal(value, read.state_dict()[name])]
    assert any("mlp" in name for name in same) and any("self_attn" in name for name in same)
    if made.mask_token is not None:
        # The tokenizer has fewer tokens than the embedding has rows.
        assert made.mask_token.id == read.config.mask_token_id == ROWS and made.mask_token.token is None


def test_the_same_seed_gives_the_same_weights(place, tmp_path):
    made = [made_at(place, "dspark", tmp_path / str(run), seed=seed)[1] for run, seed in enumerate([1, 1, 2])]
    first, *others = [drafter.state_dict() for drafter in made]
    assert [all(torch.equal(value, first[name]) for name, value in other.items()) for other in others] == [True, False]


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_depth_and_taps_follow_the_depth_of_the_target(kind, place, tmp_path):
    _, shallow = made_at(place, kind, tmp_path / "shallow")
    _, deep = made_at(place, kind, tmp_path / "deep", target="deep")
    assert (shallow.config.num_hidden_layers, shallow.target_layer_ids) == (1, [2])
    assert (deep.config.num_hidden_layers, deep.target_layer_ids) == (2, [1, 7])
    _, asked = made_at(place, kind, tmp_path / "asked", options={"num_hidden_layers": 2, "block_size": 3})
    assert (asked.config.num_hidden_layers, asked.config.block_size) == (2, 3)


@pytest.mark.parametrize("kind", COUNTING)
def test_a_draft_vocabulary_is_counted_in_what_the_target_writes(kind, place, tmp_path, monkeypatch):
    prompts = str(place / "prompts.jsonl")
    written = {"prompts": prompts, "num_prompts": 4, "max_new_tokens": 6}
    made, read = made_at(place, kind, tmp_path / "asked", options={"draft_vocab_size": 20}, **written)
    assert len(read.vocab_map) == len(made.vocabulary.token_ids) == 20 and 0 < made.vocabulary.coverage <= 1
    assert set(STOPS) <= set(read.vocab_map.tolist()) and made.vocabulary.num_tokens <= 4 * 6
    monkeypatch.setattr(DRAFTERS[kind].config_class, "usual_draft_vocab_size", 24)
    made, read = made_at(place, kind, tmp_path / "usual", **written)
    assert len(read.vocab_map) == 24 and made.notes == []
    made, read = made_at(place, kind, tmp_path / "whole")
    assert read.vocab_map is None and "with --prompts" in made.notes[0]
    with pytest.raises(ValueError, match="draft_vocab_size=20 says how many tokens.*Give --prompts"):
        made_at(place, kind, tmp_path / "none", options={"draft_vocab_size": 20})


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_of_the_same_kind_is_copied(kind, place, tmp_path):
    origin = tiny_drafter(kind, Target(tiny_stopping_model()))
    origin.save_pretrained(tmp_path / "origin")
    made, read = made_at(place, kind, tmp_path / "new", from_drafter=str(tmp_path / "origin"))
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in origin.state_dict().items())
    assert "a copy of" in made.start
    with pytest.raises(TypeError, match=f"--set gives block_size, but the {kind} drafter .* is copied as it is"):
        made_at(place, kind, tmp_path / "no", from_drafter=str(tmp_path / "origin"), options={"block_size": 3})


def test_a_copy_tells_of_a_mask_token_that_texts_hold(place, tmp_path):
    origin = tiny_drafter("dflash", Target(tiny_stopping_model()), mask_token_id=STOPS[0])
    origin.save_pretrained(tmp_path / "origin")
    made, _ = made_at(place, "dflash", tmp_path / "new", from_drafter=str(tmp_path / "origin"))
    assert made.mask_token.id == STOPS[0] and "it is the target's eos_token_id" in made.notes[0]


def test_a_kind_starts_from_another_where_it_can(place, tmp_path):
    origin = tiny_drafter("dflash", Target(tiny_stopping_model()))
    origin.save_pretrained(tmp_path / "dflash")
    made, read = made_at(
        place, "dspark", tmp_path / "new", from_drafter=str(tmp_path / "dflash"), options={"markov_rank": 6}
    )
    assert read.config.markov_rank == 6 and torch.equal(read.fc.weight, origin.fc.weight)
    assert made.start.startswith("the dflash drafter")
    with pytest.raises(ValueError, match="eagle3 drafter cannot start from one of kind dflash"):
        made_at(place, "eagle3", tmp_path / "no", from_drafter=str(tmp_path / "dflash"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in TRAVELLING])
def test_a_plain_model_becomes_a_drafter(kind, place, tmp_path):
    save_target(tiny_stopping_model(num_hidden_layers=1, seed=5), tmp_path / "small")
    small = str(tmp_path / "small")
    made, read = made_at(place, kind, tmp_path / "new", from_drafter=small, options={"num_draft_tokens": 3})
    assert read.num_draft_tokens == 3 and made.start == f"the model {small}"
    with pytest.raises(TypeError, match="--set gives num_hidden_layers, but the model .* is taken as it is"):
        made_at(place, kind, tmp_path / "no", from_drafter=small, options={"num_hidden_layers": 2})
    with pytest.raises(ValueError, match="whole small language model, and none was given.*--from SMALL_MODEL"):
        new_drafter(str(place / "target"), kind, str(tmp_path / "no"))


def refused(place, tmp_path, **given):
    """What is said where the target's weights are not even there; no folder is left."""
    if not (place / "weightless").exists():
        shutil.copytree(place / "target", place / "weightless")
        (place / "weightless" / "model.safetensors").unlink()
    arguments = {"target": str(place / "weightless"), "kind": "dflash", "output_dir": str(tmp_path / "new"), **given}
    with pytest.raises((ValueError, TypeError, OSError)) as told:
        new_drafter(**arguments)
    assert sorted(tmp_path.iterdir()) == []
    return str(told.value)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kind": "dflahs"}, "`kind` is 'dflahs'; it must be one of dflash, eagle3"),
        ({"options": {"blok_size": 4}}, "has no option 'blok_size'. Did you mean 'block_size'?"),
        ({"options": {"block_size": "four"}}, "block_size is 'four', but must be a whole number"),
        ({"options": {"block_size": 1}}, "block_size 1 leaves no slot to propose"),
        ({"options": {"target_layer_ids": [0, 3]}}, "target_layer_ids [0, 3] must name layers 0 … 2"),
        ({"options": {"hidden_size": 16}}, "hidden_size 16 is not the target's 32"),
        ({"options": {"attention_dropout": "much"}}, "No dflash drafter of the shape"),
        ({"options": {"mask_token_id": 0}}, "mask_token_id 0 cannot stand for a slot to fill: it is the target's eos"),
        ({"options": {"mask_token_id": 48}}, "the target's embedding has the rows 0 … 47"),
        ({"kind": "eagle3", "options": {"draft_vocab_size": 0}}, "`draft_vocab_size` is 0; it must lie in [1, 48]"),
        ({"kind": "eagle3", "options": {"target_layer_ids": [2, 1, 0]}}, "in ascending order"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl is not a file here"),
        ({"target": "no/where"}, "target 'no/where' is no folder here"),
        ({"from_drafter": "no/where"}, "drafter 'no/where' is not a folder here"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_weights_are_read(given, why, place, tmp_path):
    assert why in refused(place, tmp_path, **given)


def test_prompts_that_do_not_fit_are_told_before_weights_are_read(place, tmp_path):
    given = {"kind": "eagle3", "options": {"draft_vocab_size": 20}, "prompts": str(place / "prompts.jsonl")}
    assert "1000 of a completion" in refused(place, tmp_path, **given, max_new_tokens=1000)


def test_a_folder_in_use_is_refused_first(place, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="not empty. Give a new folder"):
        new_drafter("no/where", "dflash", str(tmp_path / "used"))


def test_a_drafter_for_another_target_is_not_copied(place, tmp_path):
    tiny_drafter("dflash", Target(tiny_model("qwen3", vocab_size=64))).save_pretrained(tmp_path / "origin")
    with pytest.raises(ValueError, match="does not fit the target .*vocab_size 64 is not the target's 48"):
        made_at(place, "dflash", tmp_path / "new", from_drafter=str(tmp_path / "origin"))
    assert not (tmp_path / "new").exists()
