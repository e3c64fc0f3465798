"""Adapters on the drafter (PEFT): saved, read back merged, exported as a plain folder; what they may not adapt."""

import copy

import pytest
import torch
from conftest import STOP, tiny_drafter
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, PromptTuningConfig
from test_trainer import make_trainer

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.commands.options import AdapterArguments, QuantizationArguments
from draft_opd_trl.loading import add_adapter
from draft_opd_trl.target import Target


METHODS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj", "fc"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["v_proj", "fc"]),
}


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(5)
    return [torch.randint(5, 30, (3 + i % 4,), generator=draws).tolist() for i in range(8)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_adapter_folder_reads_as_the_trained_drafter_and_exports_as_a_plain_one(
    drafter_folder, model, prompts, tmp_path, method
):
    target_before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = Dataset.from_dict({"prompt_ids": prompts})
    options = {"peft_config": copy.deepcopy(METHODS[method]), "rollout_source": "speculation"}
    trainer = make_trainer(str(drafter_folder), model, texts, tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()

    merged = load_drafter(str(tmp_path / "out"))
    base = load_drafter(str(drafter_folder))
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == flags
    changed = [name for name, value in merged.named_parameters() if not torch.equal(value, base.state_dict()[name])]
    assert "fc.weight" in changed and not any("norm" in name for name in changed)

    merged.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("adapter*"))
    exported = load_drafter(str(tmp_path / "plain"))
    settings = SpeculationSettings(20, [STOP, 3], batch_size=8)
    trainer.model.eval()
    trained = speculate(trainer.target, trainer.drafter, prompts, settings).blocks
    for drafter in (merged, exported):
        ours = speculate(trainer.target, drafter.bind(trainer.target), prompts, settings).blocks
        assert torch.equal(ours.draft_tokens, trained.draft_tokens)
        assert torch.equal(ours.num_accepted, trained.num_accepted)
    assert all(torch.equal(target_before[name], value) for name, value in model.state_dict().items())


def test_an_adapter_of_a_drafter_without_a_path_says_so(model, tmp_path):
    add_adapter(tiny_drafter("dflash", Target(model)), LoraConfig(target_modules=["fc"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name the drafter it was trained on"):
        load_drafter(str(tmp_path))


def test_what_an_adapter_cannot_reach_is_refused(model):
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig`, not dict"):
        add_adapter(tiny_drafter("dflash", Target(model)), {"r": 2})
    with pytest.raises(ValueError, match="PromptTuningConfig trains a prompt"):
        add_adapter(tiny_drafter("dflash", Target(model)), PromptTuningConfig(num_virtual_tokens=4))
    for options in ({"target_modules": ["fc", "lm_head"]}, {"target_modules": ["fc"], "modules_to_save": ["lm_head"]}):
        with pytest.raises(ValueError, match="adapts the drafter's head"):
            add_adapter(tiny_drafter("eagle3", Target(model)), LoraConfig(**options))


def test_options_make_the_configurations_they_name():
    assert AdapterArguments().peft_config() is None
    config = AdapterArguments(use_peft=True, lora_r=4, lora_target_modules=["all-linear"]).peft_config()
    assert (config.r, config.target_modules, config.task_type) == (4, "all-linear", None)
    assert QuantizationArguments().quantization_config() is None
    config = QuantizationArguments(load_in_4bit=True).quantization_config()
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    # Above 0 a text would depend on those beside it in the batch.
    assert QuantizationArguments(load_in_8bit=True).quantization_config().llm_int8_threshold == 0
