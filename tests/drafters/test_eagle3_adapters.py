"""Adapters on EAGLE-3's own head and embedding: one counts wherever logits are read, one is refused."""

import copy

import pytest
import torch
from conftest import STOPS, tiny_drafter, tiny_tokenizer
from datasets import Dataset
from peft import LoraConfig
from runs import make_trainer, spelled_prompts
from safetensors.torch import load_file

from draft_opd_trl import SpeculationSettings, load_drafter, speculate
from draft_opd_trl.core.target import Target
from draft_opd_trl.evaluation.traces import trace_texts
from draft_opd_trl.training.loading import add_adapter


HEADS = {
    "lora": LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["lm_head", "fc"], use_dora=True, init_lora_weights=False),
    "whole": LoraConfig(r=2, target_modules=["fc"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("method", sorted(HEADS))
def test_an_adapter_on_a_drafters_own_head_counts_wherever_logits_are_read(model, tmp_path, method):
    """In losses, proposals, traces and what is saved, which is what was trained and no more."""
    tiny_drafter("eagle3", Target(model)).save_pretrained(tmp_path / "base")
    prompts = spelled_prompts(8)
    texts = Dataset.from_dict({"prompt_ids": prompts})
    options = {"peft_config": copy.deepcopy(HEADS[method]), "rollout_source": "speculation", "rejected_weight": 0.5}
    trainer = make_trainer(str(tmp_path / "base"), model, texts, tmp_path / "out", **options)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    trainer.save_model()
    after = dict(trainer.model.named_parameters())
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == sum(value.numel() for value in before.values())

    trained, target = trainer.drafter, trainer.target
    trainer.model.eval()
    merged, base = (load_drafter(str(tmp_path / name)).bind(target) for name in ("out", "base"))
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    assert trained.linear_head is None and merged.linear_head is merged.lm_head.weight
    settings = SpeculationSettings(20, STOPS, batch_size=8)
    rollout = speculate(target, trained, prompts, settings)
    assert torch.equal(rollout.blocks.draft_tokens, speculate(target, merged, prompts, settings).blocks.draft_tokens)
    found = {}
    for name, drafter in (("trained", trained), ("merged", merged), ("base", base)):
        traces = trace_texts(target, drafter, rollout, tiny_tokenizer())
        features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
        logits = drafter.logits(drafter.draft(features, rollout.tokens, rollout.blocks)).detach()
        shares = torch.tensor([share for trace in traces for block in trace.blocks for share in block.draft_probs])
        found[name] = logits, shares
    torch.testing.assert_close(found["trained"], found["merged"], rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(*pair, atol=1e-3) for pair in zip(found["trained"], found["base"], strict=True))


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["fc"], "modules_to_save": ["embed_tokens"]}],
)
def test_embeddings_that_are_kept_as_they_are_take_no_adapter(qwen_target, options):
    drafter = tiny_drafter("eagle3", qwen_target, own_embeddings=True)
    with pytest.raises(ValueError, match=r"adapts \['embed_tokens'\], which a eagle3 drafter .* keeps as it is"):
        add_adapter(drafter, LoraConfig(**options))
