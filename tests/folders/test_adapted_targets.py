"""An adapter's folder as a target: its base with the adapter merged, tokenizer and config included."""

import pytest
import torch
from conftest import save_target, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.errors import InputError, NotFoundError
from draft_opd_trl.folders.target_folder import read_target_config
from draft_opd_trl.training.loading import load_pair, load_target


@pytest.fixture
def adapted(tmp_path):
    """A LoRA adapter that says something, and what the adapted model says."""
    save_target(tiny_model("qwen3"), tmp_path / "base")
    base = load_pair([], str(tmp_path / "base"))[0].model
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(base.requires_grad_(True), config)
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        return tmp_path, tokens, model.eval()(input_ids=tokens).logits


def test_it_is_its_base_with_the_adapter_merged(adapted):
    folder, tokens, expected = adapted
    plain, _, _ = load_pair([], str(folder / "base"))
    target, _, tokenizer = load_pair([], str(folder / "adapter"))
    got, before = (one.logits(one.forward_text(tokens, ())[1]) for one in (target, plain))
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(before, expected, atol=0.1)
    assert tokenizer.eos_token == "<|end|>" and target.name == str(folder / "adapter")
    assert target.fingerprint() != plain.fingerprint()
    model = load_target(str(folder / "adapter"), DraftOPDConfig("unused", report_to="none"), None)
    torch.testing.assert_close(model(input_ids=tokens).logits, expected)
    assert not any(weight.requires_grad for weight in target.model.parameters())


def test_it_is_not_merged_into_quantised_weights(adapted):
    folder, _, _ = adapted
    with pytest.raises(InputError, match="would be merged into quantised weights, which rounds it away"):
        load_pair([], str(folder / "adapter"), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_an_adapter_without_its_base_says_so(adapted):
    folder, _, _ = adapted
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(folder / "base"), str(folder / "gone")))
    with pytest.raises(NotFoundError, match="target .*gone' is no folder here"):
        read_target_config(str(folder / "adapter"))


def test_weights_of_another_shape_are_refused(adapted):
    folder, _, _ = adapted
    save_target(tiny_model("qwen3", num_hidden_layers=2), folder / "base")
    with pytest.raises(InputError, match="are not this model's. Missing"):
        load_pair([], str(folder / "adapter"))
