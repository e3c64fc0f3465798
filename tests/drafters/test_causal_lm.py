"""What a small causal language model does alone: families other than the target's, plain folders, vocabularies."""

import json

import pytest
import torch
from conftest import random_prompts, tiny_drafter, tiny_model, tiny_tokenizer, train_drafter
from invariants import (
    assert_a_grid_proposes_what_single_anchors_do,
    assert_draft_is_propose,
    assert_every_parameter_gets_a_gradient,
    assert_lossless,
    assert_replay_is_speculation,
    assert_same_drafter,
    every_anchor,
    generated,
    sample_texts,
)
from peft import LoraConfig, PeftModel
from runs import make_trainer, spelled_prompts, written_texts
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GraniteConfig, GraniteForCausalLM

from draft_opd_trl import create_drafter, load_drafter
from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.replay import read_text, text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings
from draft_opd_trl.drafters.causal_lm_config import CausalLMConfig
from draft_opd_trl.folders.checkpoints import export_drafter
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.folders.serving import launch_commands


# A drafter of another family than the target's; Gemma's windows of six are shorter than the texts.
MODELS = {
    "llama-tied": ("llama", {"num_hidden_layers": 1, "tie_word_embeddings": True}),
    "gemma3-windows": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
}


@pytest.fixture(scope="module", params=MODELS)
def plain(request, tmp_path_factory):
    """The folder of a model that is no drafter."""
    family, options = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(family, seed=7, **options).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def drafter(qwen_target, plain, prompts):
    made = create_drafter("causal_lm", qwen_target, path=plain, num_draft_tokens=3)
    return train_drafter(qwen_target, made, prompts, steps=12)


# -- drafting ------------------------------------------------------------------------------------------------------


def test_a_model_of_another_family_keeps_the_invariants(qwen_target, drafter, prompts):
    assert_draft_is_propose(qwen_target, drafter)
    assert_a_grid_proposes_what_single_anchors_do(qwen_target, drafter)
    rollout = assert_lossless(qwen_target, drafter, prompts, SpeculationSettings(24, [], batch_size=3))
    assert len(set(rollout.blocks.num_accepted.tolist())) >= 3, "the case must hold early and late errors"
    assert_replay_is_speculation(qwen_target, drafter, rollout)
    drafter.zero_grad()
    assert_every_parameter_gets_a_gradient(qwen_target, drafter)


def _widths(drafter):
    """Tokens a text that each pass of the decoder will have read."""
    widths = []
    drafter.get_decoder().register_forward_pre_hook(
        lambda _, __, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return widths


@torch.no_grad()
def test_proposing_reads_each_token_once_and_leaves_the_state(qwen_target):
    drafter, rollout = tiny_drafter("causal_lm", qwen_target), sample_texts()
    state = read_text(drafter, rollout, None)
    before = [part.clone() for layer in state.layers for part in (layer.keys, layer.values)]
    widths, anchors = _widths(drafter), torch.tensor([[1, 3, 5]]).expand(3, -1)
    drafter.propose(state, rollout.tokens.gather(1, anchors), anchors, 6, Chooser())
    assert widths == [3] * 4
    after = [part for layer in state.layers for part in (layer.keys, layer.values)]
    assert all(map(torch.equal, before, after))


def test_a_block_that_is_the_text_costs_the_text_alone(qwen_target):
    drafter = tiny_drafter("causal_lm", qwen_target)
    widths = _widths(drafter)
    rollout = sample_texts()
    blocks = every_anchor(rollout, 4)
    inside = (blocks.num_valid == 4).nonzero()[:, 0]
    blocks = text_blocks(rollout, blocks.texts[inside], blocks.anchors[inside], 4)
    states = drafter.draft(None, rollout.tokens, blocks)
    blocks.draft_tokens[0, 1] += 1  # of which what comes after, two tokens and this one, is no text
    changed = drafter.draft(None, rollout.tokens, blocks)
    assert widths == [rollout.tokens.shape[1], rollout.tokens.shape[1] + 2]
    assert torch.allclose(changed[0, :2], states[0, :2], atol=1e-5) and not torch.allclose(changed[0, 2], states[0, 2])
    torch.testing.assert_close(changed[1:], states[1:])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, "no causal language model"),
        (GPT2Config().to_dict(), "'positions': 'learned, or none'"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_scaling'"),
        ({"model_type": "gpt_oss", "num_draft_tokens": 0}, "num_draft_tokens is 0"),
    ],
)
def test_what_cannot_be_drafted_with_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        CausalLMConfig(**config)


def test_rounding_alone_is_no_reason_to_refuse():
    """Of 16 bits and many layers: two orders of the same sums differ by some per cent of the largest logit."""
    target = Target(tiny_model("llama", num_hidden_layers=24))
    drafter = create_drafter("causal_lm", target, num_hidden_layers=24, num_draft_tokens=8)
    assert drafter.to(torch.bfloat16).bind(target).dtype == torch.bfloat16


def test_a_head_that_does_more_is_refused_where_it_is_bound(qwen_target, tmp_path):
    shape = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "pad_token_id": 0}
    GraniteForCausalLM(GraniteConfig(**shape, **heads, logits_scaling=3.0)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A granite model computes more than attention .* and a head"):
        create_drafter("causal_lm", qwen_target, path=str(tmp_path))


# -- the folder ----------------------------------------------------------------------------------------------------


def test_its_folder_is_a_plain_model_and_a_drafter(qwen_target, drafter, prompts, tmp_path):
    drafter.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != drafter.config.tie_word_embeddings
    assert_same_drafter(qwen_target, drafter, load_drafter(str(tmp_path)))
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is type(drafter.plain()) and not any(told.values())
    text = torch.tensor([prompts[0] * 3])
    torch.testing.assert_close(model(text).logits, drafter.eval().plain()(text).logits)
    told = inspect_drafter(str(tmp_path))
    assert told["kind"] == "causal_lm" and told["config"]["num_draft_tokens"] == 3 and told["faults"] == []
    # It is told from others by K alone, so it stays a drafter where the plain model is saved again.
    model.save_pretrained(tmp_path / "again")
    assert load_drafter(str(tmp_path / "again")).num_draft_tokens == 3


def test_a_plain_model_is_taken_for_a_drafter_only_by_its_path(qwen_target, plain, tmp_path):
    with pytest.raises(ValueError, match="and no drafter.* --format causal_lm"):
        load_drafter(plain)
    with pytest.raises(ValueError, match="holds no causal language model that transformers reads"):
        create_drafter("causal_lm", qwen_target, path=str(tmp_path))
    with pytest.raises(TypeError, match="xyzzy"):
        create_drafter("causal_lm", qwen_target, path=plain, xyzzy=1)


def test_export_makes_a_drafter_of_a_plain_model(qwen_target, target_folder, plain, tmp_path):
    with pytest.raises(ValueError, match="is a plain model.*give `target`"):
        export_drafter(plain, str(tmp_path / "drafter"), "causal_lm")
    made = create_drafter("causal_lm", qwen_target, path=plain)
    for dtype in ("auto", "bfloat16"):
        written = export_drafter(plain, str(tmp_path / dtype), "causal_lm", target=str(target_folder), dtype=dtype)
        assert {str(parameter.dtype) for parameter in written.parameters()} == {
            f"torch.{dtype}".replace("auto", "float32")
        }
    assert_same_drafter(qwen_target, made, load_drafter(str(tmp_path / "auto")))
    # Of a drafter it writes that drafter.
    again = export_drafter(str(tmp_path / "auto"), str(tmp_path / "again"), "causal_lm", target=str(target_folder))
    assert_same_drafter(qwen_target, made, again)


def test_a_tie_that_is_none_is_refused(qwen_target, tmp_path):
    drafter = tiny_drafter("causal_lm", qwen_target, tie_word_embeddings=True)
    drafter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"tie_word_embeddings is true, but \['lm_head.weight'\] is not the embedding"
    ):
        load_drafter(str(tmp_path))


def test_generate_with_it_writes_the_targets_text(qwen_target, drafter, prompts, tmp_path):
    drafter.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for prompt in prompts[:3]:
        assert generated(qwen_target, prompt, 16, assistant_model=model) == generated(qwen_target, prompt, 16)


def test_what_the_engines_are_told(qwen_target):
    commands = launch_commands(tiny_drafter("causal_lm", qwen_target), "org/target", "org/drafter")
    assert '{"method": "draft_model", "num_speculative_tokens": 4, "model": "org/drafter"}' in commands["vLLM"]
    flags = commands["SGLang"].replace("\\\n", "").split("--")[2:]
    assert [flag.strip() for flag in flags] == [
        "speculative-algorithm STANDALONE",
        "speculative-draft-model-path org/drafter",
        "speculative-num-steps 4",
        "speculative-eagle-topk 1",
        "speculative-num-draft-tokens 5",
    ]


# -- vocabularies --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path):
    """`pair(rows)`: a target of 48 rows with a tokenizer of 32 tokens, and the folder of a model with the same."""

    def build(rows, **changed):
        folders = tmp_path / "target", tmp_path / "model"
        for folder, size in zip(folders, (48, rows), strict=True):
            tiny_model("qwen3", vocab_size=size, num_hidden_layers=1, **changed).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return Target(AutoModelForCausalLM.from_pretrained(folders[0])), folders[1]

    return build


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [40, 56])
def test_padding_of_the_vocabulary_becomes_the_targets(pair, rows, tied):
    target, folder = pair(rows, tie_word_embeddings=tied)
    drafter = create_drafter("causal_lm", target, path=str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert drafter.config.vocab_size == 48 and drafter.config.tie_word_embeddings == tied
    text = torch.tensor([[5, 9, 30, 7]])
    logits = drafter.plain()(text).logits
    torch.testing.assert_close(logits[..., :40], model(text).logits[..., :40])
    # A token that is none stands in the middle.
    if rows < 48:
        mean = model(text).logits.mean(-1)
        torch.testing.assert_close(logits[..., 40:], mean[..., None].expand(-1, -1, 8), rtol=1e-4, atol=1e-4)


def test_other_tokens_are_refused_with_both_sizes(pair):
    target, folder = pair(40)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["é"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="vocabulary of 40, and the target .* one of 48, with 1 tokens that differ"):
        create_drafter("causal_lm", target, path=str(folder))
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="vocabulary of 40.* one of 48.*cannot be told"):
        create_drafter("causal_lm", target, path=str(folder))


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


def test_an_adapter_on_it_is_one_of_the_plain_model(model, texts, tmp_path):
    target = Target(model)
    tiny_drafter("causal_lm", target).save_pretrained(tmp_path / "drafter")
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    trainer = make_trainer(str(tmp_path / "drafter"), model, texts, tmp_path / "out", peft_config=config)
    trainer.train()
    trainer.save_model()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "drafter")
    text, before = torch.tensor([random_prompts(1, vocab_size=30)[0] * 4]), base.state_dict()["lm_head.weight"].clone()
    adapted = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    merged = load_drafter(str(tmp_path / "out"))
    assert not torch.equal(merged.state_dict()["lm_head.weight"], before)
    torch.testing.assert_close(adapted(text).logits, merged.plain()(text).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_one_trains_and_stays_tied(model, texts, tmp_path):
    drafter = tiny_drafter("causal_lm", Target(model), tie_word_embeddings=True)
    before = drafter.get_input_embeddings().weight.detach().clone()
    trainer = make_trainer(drafter, model, texts, tmp_path, rollout_source="speculation", rejected_weight=0.5)
    trainer.train()
    trainer.save_model()
    loaded = load_drafter(str(tmp_path))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert not torch.equal(loaded.get_input_embeddings().weight, before)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True
    with pytest.raises(ValueError, match="adapts the head of a causal_lm drafter whose head is its embedding"):
        make_trainer(loaded, model, texts, tmp_path, peft_config=LoraConfig(target_modules=["lm_head", "q_proj"]))
