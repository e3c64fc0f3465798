"""Checkpoints of multimodal models and adapters of a target: text prompts work, whichever class the config names."""

import json

import pytest
import torch
from conftest import KINDS, random_prompts, save_target, tiny_drafter
from datasets import Dataset
from multimodal import MULTIMODAL, tiny_multimodal
from runs import make_trainer, parameters_of, spelled_prompts

from draft_opd_trl import DraftOPDConfig, SpeculationSettings, load_drafter, speculate
from draft_opd_trl.cli import main
from draft_opd_trl.core.target import Target
from draft_opd_trl.evaluation.by_replay import measure_by_replay
from draft_opd_trl.evaluation.measure import measure_acceptance
from draft_opd_trl.folders.checkpoints import load_target_shape
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.training.loading import load_pair, load_target
from draft_opd_trl.training.new_drafter import new_drafter
from draft_opd_trl.training.rehearsal import target_model


@pytest.fixture(scope="module", params=sorted(MULTIMODAL))
def folder(request, tmp_path_factory):
    """A checkpoint that names the whole model's class, as published ones do."""
    folder = tmp_path_factory.mktemp(request.param) / "target"
    save_target(tiny_multimodal(request.param), folder)
    return folder


def test_a_text_model_inside_a_multimodal_one_is_a_target(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0].endswith("ForConditionalGeneration") and "vision_config" in config
    target, _, _ = load_pair([], str(folder))
    shape = load_target_shape(str(folder))
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (4, 32, 48)
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (4, 32, 48)
    assert len(target.decoder.layers) == 4
    drafter = tiny_drafter("dflash", target)
    prompts, settings = random_prompts(4, seed=3), SpeculationSettings(12, [3], batch_size=3)
    texts = speculate(target, None, prompts, settings)
    # The whole model's own argmax along the text.
    said = target.model(input_ids=texts.tokens, use_cache=False).logits.argmax(-1)
    for row, (start, end) in enumerate(zip(texts.prompt_lengths, texts.lengths, strict=True)):
        assert torch.equal(said[row, start - 1 : end - 1], texts.tokens[row, start:end])
    by_replay = measure_by_replay(target, drafter, prompts, settings, range(4))
    by_speculation = measure_acceptance(target, drafter, prompts, settings)
    assert by_replay.accepted == by_speculation.accepted
    assert by_speculation.completions == texts.completions()


def test_training_and_the_plan_load_the_same_model(folder):
    model = load_target(str(folder), DraftOPDConfig("unused", report_to="none"), None)
    target, _, _ = load_pair([], str(folder))
    assert type(model) is type(target.model)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), target.model.parameters(), strict=True)
    )
    assert type(target_model(model.config)) is type(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal_lm"])
def test_new_drafters_are_made_for_it_and_inspected_with_it(folder, tmp_path, kind):
    options = {"num_hidden_layers": 1} if kind != "eagle3" else {}
    made = new_drafter(str(folder), kind, str(tmp_path / "drafter"), options=options)
    assert made.drafter.config.hidden_size == 32
    found = inspect_drafter(str(tmp_path / "drafter"), str(folder))
    assert found["loads"]["draft_opd_trl"] is True
    load_drafter(str(tmp_path / "drafter")).check_target(load_target_shape(str(folder)))


@pytest.fixture(scope="module", params=["gemma3", "qwen3_5"])
def place(request, tmp_path_factory):
    """A checkpoint whose cache is one of positions, or one of kept states, with a drafter for it."""
    place = tmp_path_factory.mktemp(request.param)
    model = tiny_multimodal(request.param)
    save_target(model, place / "target")
    tiny_drafter("dflash", Target(model)).save_pretrained(place / "drafter")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ab{'c' * i}"}) + "\n" for i in range(3)))
    return place


@pytest.mark.parametrize("source", ["generate", "speculation"])
def test_a_drafter_is_trained_for_it(place, tmp_path, source):
    prompts = Dataset.from_dict({"prompt_ids": spelled_prompts(4)})
    options = {"max_steps": 1, "rollout_source": source, "max_completion_length": 12}
    trainer = make_trainer(str(place / "drafter"), str(place / "target"), prompts, tmp_path, **options)
    before, frozen = parameters_of(trainer), Target(load_target(str(place / "target"), trainer.args, None))
    loss = trainer.train().training_loss
    assert 0 < loss < float("inf") and trainer.state.global_step == 1
    after = parameters_of(trainer)
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
    pairs = zip(trainer.target.model.parameters(), frozen.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_command_measures_it_by_replay_as_by_speculation(place, tmp_path):
    found = []
    for way in ("replay", "speculation"):
        words = ["--model", place / "drafter", "--teacher", place / "target", "--suite", place / "prompts.jsonl"]
        words += ["--max_new_tokens", 12, "--by", way, "--output_dir", tmp_path / way]
        main(["evaluate", *map(str, words)])
        (result,) = json.loads((tmp_path / way / "results.json").read_text())["results"]
        found.append(result["drafters"]["drafter"])
    assert [measured["replayed"] for measured in found] == [True, False]
    assert found[0]["acceptance_length"] == found[1]["acceptance_length"]
    assert found[1]["texts"]["changed"] == 0


def test_an_instance_is_read_as_its_checkpoint(folder):
    """Also where the whole holds a whole causal language model, which is then the target (Llama 4)."""
    model = tiny_multimodal(json.loads((folder / "config.json").read_text())["model_type"])
    model.generation_config.eos_token_id = [3]
    ours, (theirs, _, _) = Target(model), load_pair([], str(folder))
    text = torch.arange(9)[None]
    for got, expected in zip(ours.forward_text(text, (0, 2)), theirs.forward_text(text, (0, 2)), strict=True):
        torch.testing.assert_close(got, expected)
    assert ours.model.generation_config.eos_token_id == [3]
