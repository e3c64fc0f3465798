"""Adapters on the drafter (PEFT): saved, read back merged, exported as a plain folder; what they may not adapt."""

import copy
import json

import pytest
import torch
from conftest import ANY_KIND, STOPS, tiny_drafter
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, PromptTuningConfig
from runs import make_trainer, spelled_prompts
from safetensors.torch import load_file, save_file

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.commands.options import AdapterArguments, QuantizationArguments
from draft_opd_trl.core.errors import InputError
from draft_opd_trl.core.target import Target
from draft_opd_trl.training.loading import add_adapter


METHODS = {
    "lora": LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["v_proj", "q_proj"]),
}


@pytest.fixture(scope="module")
def prompts():
    return spelled_prompts(8)


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
    assert any("q_proj" in name for name in changed) and not any("norm" in name for name in changed)

    merged.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("adapter*"))
    exported = load_drafter(str(tmp_path / "plain"))
    settings = SpeculationSettings(20, STOPS, batch_size=8)
    trainer.model.eval()
    trained = speculate(trainer.target, trainer.drafter, prompts, settings).blocks
    for drafter in (merged, exported):
        ours = speculate(trainer.target, drafter.bind(trainer.target), prompts, settings).blocks
        assert torch.equal(ours.draft_tokens, trained.draft_tokens)
        assert torch.equal(ours.num_accepted, trained.num_accepted)
    assert all(torch.equal(target_before[name], value) for name, value in model.state_dict().items())


def test_an_adapter_of_a_drafter_without_a_path_says_so(model, tmp_path):
    add_adapter(tiny_drafter(ANY_KIND, Target(model)), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not name the model it was trained on"):
        load_drafter(str(tmp_path))


def _adapted(drafter_folder, tmp_path, init=False, **fields):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    add_adapter(load_drafter(drafter_folder), config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "Missing: .*q_proj.lora_B.weight"),
        (lambda tensors, name: tensors.update({f"x.{name}": tensors.pop(name)}), "Unexpected: .*x.base_model"),
        (
            lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)}),
            "is torch.int8, not torch.float32",
        ),
        (
            lambda tensors, name: tensors.update({name: tensors[name][:, :1].clone()}),
            "Wrong shape: .*q_proj.lora_B.weight",
        ),
        (lambda tensors, name: tensors.update(more=torch.ones(1)), r"Unexpected: \['more'\]"),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "not finite in"),
        (lambda tensors, name: tensors.clear(), "Missing"),
    ],
)
def test_an_adapter_is_read_with_exactly_its_tensors(drafter_folder, tmp_path, change, words):
    """PEFT would leave what is missing at its start, and so load the base without a word."""
    file = _adapted(drafter_folder, tmp_path)
    tensors = load_file(file)
    change(tensors, min(name for name in tensors if "q_proj.lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(InputError, match=words):
        load_drafter(str(tmp_path))


def test_an_untrained_adapter_changes_nothing_and_a_trained_one_must(drafter_folder, tmp_path):
    _adapted(drafter_folder, tmp_path / "new", init=True)
    base, merged = load_drafter(drafter_folder), load_drafter(str(tmp_path / "new"))
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in merged.state_dict().items())
    file = _adapted(drafter_folder, tmp_path / "small")
    save_file({name: 1e-20 * tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="changed no weight of .*, though it is not zero"):
        load_drafter(str(tmp_path / "small"))


def test_the_base_of_an_adapter_is_a_whole_drafter(drafter_folder, tmp_path):
    _adapted(drafter_folder, tmp_path, base_model_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match="which is an adapter itself"):
        load_drafter(str(tmp_path))


def test_the_card_beside_an_adapter_is_ours(drafter_folder, model, prompts, tmp_path):
    texts = Dataset.from_dict({"prompt_ids": prompts})
    config = LoraConfig(r=2, target_modules=["q_proj"])
    options = {"peft_config": config, "rollout_source": "speculation", "max_steps": 1}
    trainer = make_trainer(drafter_folder, model, texts, tmp_path / "out", **options)
    trainer.train()
    trainer.save_model()
    for file in (tmp_path / "out").rglob("README.md"):
        text = file.read_text()
        assert "holds an adapter (LORA)" in text and "draft-opd export" in text and str(tmp_path) not in text


def test_what_an_adapter_cannot_reach_is_refused(model):
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig`, not dict"):
        add_adapter(tiny_drafter(ANY_KIND, Target(model)), {"r": 2})
    with pytest.raises(ValueError, match="PromptTuningConfig trains a prompt"):
        add_adapter(tiny_drafter(ANY_KIND, Target(model)), PromptTuningConfig(num_virtual_tokens=4))


def test_options_make_the_configurations_they_name():
    assert AdapterArguments().peft_config() is None
    config = AdapterArguments(use_peft=True, lora_r=4, lora_target_modules=["all-linear"]).peft_config()
    assert (config.r, config.target_modules, config.task_type) == (4, "all-linear", None)
    assert QuantizationArguments().quantization_config() is None
    config = QuantizationArguments(load_in_4bit=True).quantization_config()
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    # Above 0 a text would depend on those beside it in the batch.
    assert QuantizationArguments(load_in_8bit=True).quantization_config().llm_int8_threshold == 0
