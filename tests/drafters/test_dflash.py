"""DFlash by an independent reference: the model block by block, what a block sees, and transformers' own decoding."""

import pytest
import torch
from by_hand import attention, rms, rope
from conftest import SHIPPED, pocket_target_and_prompts, tiny_drafter, tiny_model, train_drafter
from invariants import assert_starts_from_the_targets_layers, every_anchor, generated, sample_texts
from torch.nn import functional
from transformers import AutoModel
from transformers.generation import candidate_generator

from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.folders.checkpoints import load_drafter


def _slow_block(drafter, target, features, tokens, anchor):
    """One DFlash block from the weights alone: features `(T, F)`, tokens `(T,)` → states at slots 1 … K."""
    config, weights = drafter.config, drafter.state_dict()
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    context = rms(features[:anchor] @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    ids = torch.tensor([int(tokens[anchor])] + [config.mask_token_id] * (config.block_size - 1))
    hidden = target.model.get_input_embeddings()(ids)
    own = torch.arange(anchor, anchor + config.block_size)
    everywhere = torch.arange(anchor + config.block_size)
    for layer in range(config.num_hidden_layers):

        def weight(name, layer=layer):
            return weights[f"layers.{layer}.{name}.weight"]

        normed = rms(hidden, weight("input_layernorm"), eps)
        both = torch.cat([context, normed])
        queries = (normed @ weight("self_attn.q_proj").T).view(-1, heads, width)
        keys = (both @ weight("self_attn.k_proj").T).view(-1, kv_heads, width)
        values = (both @ weight("self_attn.v_proj").T).view(-1, kv_heads, width)
        queries = rope(rms(queries, weight("self_attn.q_norm"), eps), own, theta)
        keys = rope(rms(keys, weight("self_attn.k_norm"), eps), everywhere, theta)
        hidden = hidden + attention(queries, keys, values) @ weight("self_attn.o_proj").T
        normed = rms(hidden, weight("post_attention_layernorm"), eps)
        gate = functional.silu(normed @ weight("mlp.gate_proj").T) * (normed @ weight("mlp.up_proj").T)
        hidden = hidden + gate @ weight("mlp.down_proj").T
    return rms(hidden, weights["norm.weight"], eps)[1:]


def _read(target):
    """A drafter, texts, their features, and blocks at all of their anchors."""
    drafter = tiny_drafter("dflash", target)
    rollout = sample_texts(seed=8)
    features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
    return drafter, rollout, features, every_anchor(rollout, drafter.num_draft_tokens)


@torch.no_grad()
def test_it_equals_a_slow_reference_block_by_block(target):
    drafter, rollout, features, blocks = _read(target)
    got = drafter.draft(features, rollout.tokens, blocks)
    for index, (text, anchor) in enumerate(zip(blocks.texts.tolist(), blocks.anchors.tolist(), strict=True)):
        expected = _slow_block(drafter, target, features[text], rollout.tokens[text], anchor)
        torch.testing.assert_close(got[index], expected, rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_targets_layers(target):
    assert_starts_from_the_targets_layers(target, "dflash")


@torch.no_grad()
def test_packing_many_blocks_in_small_chunks_changes_nothing(qwen_target):
    drafter, rollout, features, blocks = _read(qwen_target)
    whole = drafter.draft(features, rollout.tokens, blocks)
    drafter.blocks_per_chunk = 3
    torch.testing.assert_close(drafter.draft(features, rollout.tokens, blocks), whole, rtol=1e-5, atol=1e-5)
    shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        drafter.draft(features, rollout.tokens, blocks.select(shuffled)), whole[shuffled], rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_a_block_sees_neither_its_anchors_features_nor_the_future(qwen_target):
    drafter, rollout, features, _ = _read(qwen_target)
    block = DraftBlocks(*(torch.tensor(value) for value in ([0], [3], [[0] * 4], [0], [4])))
    before = drafter.draft(features, rollout.tokens, block)
    changed, tokens = features.clone(), rollout.tokens.clone()
    changed[:, 3:] += 5
    tokens[:, 4:] = 1
    torch.testing.assert_close(drafter.draft(changed, tokens, block), before)
    changed[:, 2] += 5
    assert not torch.allclose(drafter.draft(changed, tokens, block), before, atol=1e-3)


def test_tied_target_lends_its_embedding_as_head():
    target = Target(tiny_model("qwen3", tie_word_embeddings=True))
    drafter = tiny_drafter("dflash", target)
    assert drafter.linear_head.data_ptr() == target.model.get_input_embeddings().weight.data_ptr()


# -- transformers' own DFlash as an outside reference --------------------------------------------------------------


def test_transformers_own_decoding_says_the_same(target, prompts, monkeypatch):
    drafter = train_drafter(target, tiny_drafter("dflash", target), prompts, steps=50)
    theirs = []
    original = candidate_generator.DFlashTokenCandidateGenerator.get_candidates

    def observed(self, input_ids, *args, **kwargs):
        candidates, logits = original(self, input_ids, *args, **kwargs)
        if candidates.shape[1] > input_ids.shape[1]:
            theirs.append((input_ids.shape[1] - 1, candidates[0, input_ids.shape[1] :].tolist()))
        return candidates, logits

    monkeypatch.setattr(candidate_generator.DFlashTokenCandidateGenerator, "get_candidates", observed)
    rollout = speculate(target, drafter, prompts, SpeculationSettings(24, []))
    compared = 0
    for row, prompt in enumerate(prompts):
        if len(prompt) == 1:
            continue
        theirs.clear()
        text = generated(target, prompt, 24, assistant_model=drafter, speculation_type="dflash")
        assert text == rollout.completions()[row]
        mine = rollout.blocks.select(rollout.blocks.texts == row)
        proposals = dict(zip(mine.anchors.tolist(), mine.draft_tokens.tolist(), strict=True))
        for anchor, tokens in theirs:
            if anchor in proposals:
                assert tokens == proposals[anchor][: len(tokens)]
                compared += 1
    assert compared > 40


@pytest.mark.parametrize("folder", [path for path in SHIPPED if "dflash" in path.name], ids=lambda path: path.name)
def test_transformers_own_decoding_writes_the_same_with_a_trained_drafter(folder):
    target, prompts = pocket_target_and_prompts(3)
    drafter = load_drafter(str(folder)).bind(target)
    texts = speculate(target, drafter, prompts, SpeculationSettings(40, [])).completions()
    options = {"assistant_model": drafter, "speculation_type": "dflash"}
    assert [generated(target, prompt, 40, **options) for prompt in prompts] == texts


def test_transformers_own_decoding_takes_the_code_that_travels(qwen_target, tmp_path, code_cache):
    tiny_drafter("dflash", qwen_target).save_pretrained(tmp_path)
    drafter = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval().bind(qwen_target)
    assert type(drafter).__module__.startswith("transformers_modules.")
    prompt = list(range(3, 12))
    options = {"assistant_model": drafter, "speculation_type": "dflash"}
    assert generated(qwen_target, prompt, 20, **options) == generated(qwen_target, prompt, 20)
