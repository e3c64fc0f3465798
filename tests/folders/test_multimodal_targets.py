"""Checkpoints of multimodal models and adapters of a target: text prompts work, whichever class the config names."""

import json

import pytest
import torch
from conftest import KINDS, random_prompts, save_target, tiny_drafter
from multimodal import MULTIMODAL, tiny_multimodal

from draft_opd_trl import DraftOPDConfig, SpeculationSettings, load_drafter, speculate
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
