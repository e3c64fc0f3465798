"""EAGLE-3 configs and folders: what fits, what is written, every published layout, and what is refused by name."""

import json

import pytest
import torch
from conftest import VOCAB, random_prompts, tiny_drafter
from invariants import assert_same_weights
from readers import (
    assert_config_fault,
    assert_engines_refuse,
    assert_written_for_engines,
    drop_fields,
    launch_options,
    set_field,
)
from safetensors.torch import load_file, save_file

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import create_drafter
from draft_opd_trl.drafters.eagle3 import LlamaForCausalLMEagle3
from draft_opd_trl.drafters.eagle3_config import Eagle3Config, default_layer_ids
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import LOADERS, inspect_drafter


# -- fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_hidden_size": 16}, "target_hidden_size 16 is not the target's 32"),
        ({"vocab_size": 50}, "vocab_size 50 is not the target's 48"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}, r"\[1, 2, 3\] must name 3 of the layers 0 … 2"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 3]}, r"\[1, 1, 2\] must name 3 of the layers.*ascending"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3]}, r"\[0, 2\] must name 3"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, r"\[-1, 0, 1\] must name 3"),
        ({"draft_token_ids": [2, 9, 5, 11]}, "d2t and t2d do not hold the same tokens in ascending order"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(qwen_target, changes, message):
    config = Eagle3Config(
        **{**Eagle3Config.from_target(qwen_target.config).to_dict(), "eagle_config": None, **changes}
    )
    with pytest.raises(ValueError, match=message) as caught:
        LlamaForCausalLMEagle3(config).bind(qwen_target)
    assert "make one with `create_drafter`" in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 10**9, "7", True, 1.5, [7]])
def test_a_length_that_is_none_is_refused(qwen_target, value):
    with pytest.raises(ValueError, match="num_draft_tokens is .*, but must be a whole number from 1 to 1023"):
        create_drafter("eagle3", qwen_target, num_draft_tokens=value)


@pytest.mark.parametrize("ids", [[0, 48], [-1, 5], [9, 3]])
def test_draft_tokens_outside_the_vocabulary_are_refused(qwen_target, ids):
    with pytest.raises(ValueError, match=rf"from {ids[0]} to {ids[1]} must lie in the target's vocabulary of 48"):
        create_drafter("eagle3", qwen_target, draft_token_ids=ids)


def test_a_size_without_tokens_is_refused(qwen_target):
    with pytest.raises(ValueError, match="draft_vocab_size=20 says how many tokens, not which"):
        create_drafter("eagle3", qwen_target, draft_vocab_size=20)


@pytest.mark.parametrize(
    ("num_layers", "published"), [(36, [2, 18, 33]), (28, [2, 14, 25]), (32, [2, 16, 29]), (7, [2, 3, 4])]
)
def test_published_taps(num_layers, published):
    assert [index + 1 for index in default_layer_ids(num_layers)] == published


def test_taps_of_shallow_targets_still_ascend():
    assert [default_layer_ids(depth) for depth in (4, 5, 6)] == [[0, 1, 2], [0, 1, 3], [0, 2, 4]]


# -- folders -------------------------------------------------------------------------------------------------------

# Field → value for the tiny drafter, and where it is read: SGLang 0.5.23 (in sglang/srt/), vLLM 0.33.0 (in vllm/).
CONTRACT = {
    "architectures": ["LlamaForCausalLMEagle3"],  # sglang llama_eagle3.py:387; vllm .../configs/eagle.py
    "model_type": "llama",  # both: AutoConfig
    "draft_vocab_size": 43,  # sglang models/llama_eagle3.py:306; vllm model_executor/models/llama_eagle3.py:314
    "target_hidden_size": 32,  # sglang llama_eagle3.py:151; vllm llama_eagle3.py:219
    "eagle_aux_hidden_state_layer_ids": [1, 2, 3],  # vllm v1/worker/gpu/spec_decode/eagle/eagle3_utils.py:119
    "eagle_config.eagle_aux_hidden_state_layer_ids": [0, 1, 2],  # sglang .../spec_aux_hidden_state.py:192
    "eagle_config.use_aux_hidden_state": True,  # sglang .../spec_aux_hidden_state.py:189; vllm llama_eagle3.py
    "norm_before_residual": False,  # vllm llama_eagle3.py:101
    "fc_norm": False,  # sglang llama_eagle3.py:185; vllm llama_eagle3.py:231
}
LAYER_KEYS = {f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")}
LAYER_KEYS |= {f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"}
LAYER_KEYS |= {f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
KEYS = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"} | LAYER_KEYS


@pytest.fixture
def drafter(qwen_target):
    return tiny_drafter("eagle3", qwen_target)


@pytest.fixture
def folder(drafter, tmp_path):
    drafter.save_pretrained(tmp_path)
    return tmp_path


def _change(folder, tensors=None, **config):
    written = json.loads((folder / "config.json").read_text())
    for name, value in config.items():
        if value is ...:
            written.pop(name, None)
        else:
            written[name] = value
    (folder / "config.json").write_text(json.dumps(written))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")


def test_the_written_folder(folder):
    tensors = assert_written_for_engines(folder, CONTRACT, KEYS)
    assert tensors["d2t"].dtype == torch.int64 and tensors["t2d"].dtype == torch.bool
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert tensors["fc.weight"].shape == (32, 96)
    config = json.loads((folder / "config.json").read_text())
    # SpecForge skips the final norm wherever norm_output is written, false or not.
    assert not {"draft_token_ids", "own_embeddings", "norm_output"} & config.keys()


def test_scaled_rope_is_written_as_engines_read_it(qwen_target, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    tiny_drafter("eagle3", qwen_target, rope_parameters=rope).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    _change(tmp_path, rope_parameters=...)
    assert load_drafter(str(tmp_path)).config.rope_parameters == rope


@pytest.mark.parametrize("spelling", ["midlayer.", "layers.0."])
@pytest.mark.parametrize("embeddings", [False, True], ids=["borrowed", "own"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_published_layouts(drafter, folder, qwen_target, spelling, embeddings, pickled):
    """SpecForge writes embeddings and safetensors, SafeAILab plain Llama's name and a pickle; neither writes taps."""
    tensors = {name.replace("midlayer.", spelling): value for name, value in drafter.state_dict().items()}
    if embeddings:
        tensors["embed_tokens.weight"] = qwen_target.embedding.weight.clone()
    names = ["LlamaForCausalLM"] if pickled else ["LlamaForCausalLMEagle3"]
    _change(
        folder,
        tensors,
        architectures=names,
        eagle_config=...,
        eagle_aux_hidden_state_layer_ids=...,
        num_draft_tokens=...,
        target_hidden_size=...,
        norm_output=...,
        norm_before_residual=...,
        fc_norm=...,
        sliding_window=512,
        use_sliding_window=False,
        max_window_layers=36,
        torch_dtype="float16",
    )
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        torch.save({"not": "weights"}, folder / "training_args.bin")
    loaded = load_drafter(str(folder)).bind(qwen_target)
    assert loaded.num_draft_tokens == 7 and loaded.target_layer_ids == [0, 1, 2]
    assert hasattr(loaded, "embed_tokens") == embeddings
    assert loaded.config.architectures == names
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    prompts = random_prompts(3)
    plain = speculate(qwen_target, None, prompts, SpeculationSettings(10, []))
    assert speculate(qwen_target, loaded, prompts, SpeculationSettings(10, [])).completions() == plain.completions()
    again = folder / "again"
    loaded.save_pretrained(again)
    assert load_file(again / "model.safetensors").keys() == KEYS | ({"embed_tokens.weight"} if embeddings else set())
    assert json.loads((again / "config.json").read_text())["architectures"] == ["LlamaForCausalLMEagle3"]
    assert_same_weights(load_drafter(str(again)), loaded)


def test_a_whole_vocabulary_has_no_tables_but_may_come_with_trivial_ones(qwen_target, tmp_path):
    whole = tiny_drafter("eagle3", qwen_target, draft_token_ids=None)
    whole.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert not {"d2t", "t2d"} & tensors.keys()
    trivial = {"d2t": torch.zeros(VOCAB, dtype=torch.long), "t2d": torch.ones(VOCAB, dtype=torch.bool)}
    _change(tmp_path, {**tensors, **trivial})
    assert_same_weights(load_drafter(str(tmp_path)), whole)
    trivial["d2t"][3] = 1
    _change(tmp_path, {**tensors, **trivial})
    with pytest.raises(ValueError, match=r"Unexpected: \['d2t'\]"):
        load_drafter(str(tmp_path))


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_missing_tensor_is_named(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    _change(folder, tensors)
    with pytest.raises(ValueError, match=rf"Missing: \['{name}'\]. Unexpected: none. Wrong shape: none"):
        load_drafter(str(folder))


def test_a_tensor_spelled_both_ways_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.0.hidden_norm.weight"] = tensors["midlayer.hidden_norm.weight"].clone()
    _change(folder, tensors)
    with pytest.raises(ValueError, match=r"Unexpected: \['layers.0.hidden_norm.weight'\]"):
        load_drafter(str(folder))


def test_saving_something_else_is_refused(drafter, tmp_path):
    state = {f"module.{name}" if name == "fc.weight" else name: value for name, value in drafter.state_dict().items()}
    with pytest.raises(ValueError, match=r"Missing: \['fc.weight'\]. Unexpected: \['module.fc.weight'\]"):
        drafter.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"norm_before_fc": True}, r"asks for what is not computed here: \{'norm_before_fc': True\}"),
        ({"num_hidden_layers": 2}, "'num_hidden_layers': 2"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings': True"),
        ({"parallel_drafting": True}, "'parallel_drafting': True"),
        ({"model_type": "deepseek_v3"}, "'model_type': 'deepseek_v3'"),
        ({"sliding_window": 512}, "'sliding_window': 512"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'rope_scaling'"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "'eagle_config.use_aux_hidden_state': False"),
        ({"eagle_config": {"parallel": 2}}, "'eagle_config.parallel': 2"),
        ({"transformer_layer_config": {"hidden_size": 3}}, "'transformer_layer_config'"),
        ({"logit_scale": 0.5}, "'logit_scale': 0.5"),
    ],
)
def test_what_is_not_computed_is_refused(folder, asked, message):
    _change(folder, **asked)
    with pytest.raises(ValueError, match=message):
        load_drafter(str(folder))


# -- speculators ---------------------------------------------------------------------------------------------------


def test_a_speculators_folder(drafter, folder, qwen_target, target_folder, tmp_path_factory):
    spec = tmp_path_factory.mktemp("spec") / "spec"
    export_drafter(str(folder), str(spec), "speculators", target=str(target_folder))
    config = json.loads((spec / "config.json").read_text())
    assert config["norm_before_residual"] is False and config["draft_vocab_size"] == 43
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert "eagle_config" not in config["transformer_layer_config"]
    tensors = load_file(spec / "model.safetensors")
    assert tensors.keys() == {name.replace("midlayer.", "layers.0.") for name in KEYS} | {"embed_tokens.weight"}
    # Without it `speculators` drafts with noise.
    assert torch.equal(tensors["embed_tokens.weight"], qwen_target.embedding.weight)
    assert config["embed_requires_grad"] is False
    assert load_drafter(str(spec)).target_layer_ids == [0, 1, 2]


def test_a_speculators_folder_needs_the_targets_embedding(qwen_target, target_folder, tmp_path):
    """Of a target whose config alone is there it cannot be had; a drafter with embeddings of its own needs none."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((target_folder / "config.json").read_text())
    tiny_drafter("eagle3", qwen_target).save_pretrained(tmp_path / "flat")
    with pytest.raises(InputError, match="holds the target's embedding, but .* has none of 48 × 32"):
        export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(bare))
    assert not (tmp_path / "spec").exists()
    tiny_drafter("eagle3", qwen_target, own_embeddings=True).save_pretrained(tmp_path / "own")
    export_drafter(str(tmp_path / "own"), str(tmp_path / "spec"), "speculators", target=str(bare))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), "eagle3")
    assert torch.equal(again.embed_tokens.weight, load_drafter(str(tmp_path / "own")).embed_tokens.weight)


def test_the_embedding_is_found_in_the_shard_of_a_large_target(qwen_target, tmp_path):
    qwen_target.model.save_pretrained(tmp_path / "target", max_shard_size="8KB")
    assert len(list((tmp_path / "target").glob("*.safetensors"))) > 1
    tiny_drafter("eagle3", qwen_target).save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(tmp_path / "target"))
    tensors = load_file(tmp_path / "spec" / "model.safetensors")
    assert torch.equal(tensors["embed_tokens.weight"], qwen_target.embedding.weight)


def test_a_speculators_folder_that_does_not_say_norms_its_residual():
    """As vLLM reads it."""
    layer = {"model_type": "llama", "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 4}
    config = {
        "speculators_config": {"proposal_methods": [{"speculative_tokens": 3}]},
        "transformer_layer_config": layer,
        "draft_vocab_size": 16,
    }
    read = Eagle3Config.from_speculators(config)
    assert read.norm_before_residual is True and read.num_draft_tokens == 3 and read.draft_vocab_size == 16
    assert Eagle3Config.from_speculators({**config, "norm_before_residual": False}).norm_before_residual is False
    assert Eagle3Config.from_speculators({**config, "speculators_config": {"verifier": {}}}).num_draft_tokens == 7
    with pytest.raises(ValueError, match=r"lacks \['speculators_config'\]"):
        Eagle3Config.from_speculators({**config, "speculators_config": None})
    with pytest.raises(ValueError, match="'norm_before_fc': True"):
        Eagle3Config.from_speculators({**config, "norm_before_fc": True})
    with pytest.raises(ValueError, match="'model_type': 'qwen3'"):
        Eagle3Config.from_speculators({**config, "transformer_layer_config": {**layer, "model_type": "qwen3"}})


# -- what engines make of a folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words", "breaks"),
    [
        (set_field("architectures", ["LlamaForCausalLM"]), "SGLang loads as a target", {"SGLang"}),
        (set_field("norm_before_residual", True), "norm_before_residual is set", {"SGLang"}),
        (drop_fields("eagle_aux_hidden_state_layer_ids"), "are not written where vLLM reads", {"vLLM"}),
        (drop_fields("eagle_config"), "are not written where SGLang reads", {"SGLang"}),
        (set_field("num_hidden_layers", 2), "'num_hidden_layers': 2", set(LOADERS)),
        (set_field("tie_word_embeddings", True), "'tie_word_embeddings': True", set(LOADERS)),
    ],
)
def test_a_config_that_an_engine_reads_otherwise(make_folder, change, words, breaks):
    assert_config_fault(make_folder("eagle3", change), words, breaks)


@pytest.mark.parametrize(("family", "refuse"), [("qwen3", set()), ("llama", set()), ("gemma3", {"vLLM"})])
def test_engines_that_refuse_the_target_are_not_promised(family, refuse, tmp_path):
    assert_engines_refuse("eagle3", family, refuse, tmp_path)


def test_the_engines_are_told_what_it_is(make_folder):
    folder = make_folder("eagle3")
    vllm, sglang = launch_options(folder)
    assert vllm == {"method": "eagle3", "model": folder, "num_speculative_tokens": 4}
    assert sglang == {
        "--model-path": "TARGET",
        "--speculative-draft-model-path": folder,
        "--speculative-algorithm": "EAGLE3",
        "--speculative-num-steps": "4",
        "--speculative-eagle-topk": "1",
        "--speculative-num-draft-tokens": "5",
    }


def test_without_a_draft_vocabulary_size(make_folder):
    told = inspect_drafter(make_folder("eagle3", drop_fields("draft_vocab_size"), draft_token_ids=None))
    assert [fault["breaks"] for fault in told["faults"]] == [["SGLang"]]


def test_published_taps_need_not_be_written(make_folder):
    """For 36 layers both engines' own default is the published one."""

    def change(config):
        config["eagle_aux_hidden_state_layer_ids"] = [2, 18, 33]
        del config["eagle_config"]

    assert inspect_drafter(make_folder("eagle3", change))["faults"] == []


def test_biases_and_embeddings_that_sglang_leaves_out(make_folder):
    told = inspect_drafter(make_folder("eagle3", attention_bias=True, own_embeddings=True))
    assert [(fault["fault"].split(" is")[0], fault["breaks"]) for fault in told["faults"]] == [
        ("attention_bias", ["SGLang"]),
        ("there are embeddings, in place of which SGLang takes the target's", []),
    ]


def test_tables_of_a_whole_vocabulary(make_folder):
    folder = make_folder("eagle3", draft_token_ids=None)
    tensors = load_file(f"{folder}/model.safetensors")
    save_file({**tensors, "d2t": torch.zeros(48, dtype=torch.long)}, f"{folder}/model.safetensors")
    (fault,) = inspect_drafter(folder)["faults"]
    assert "which vLLM refuses" in fault["fault"] and fault["breaks"] == ["vLLM"]
