"""DFlash configs and folders (FIELD section 3): what is written, what fits, and what is refused by name."""

import json

import pytest
from conftest import tiny_drafter
from readers import (
    assert_config_fault,
    assert_engines_refuse,
    assert_written_for_engines,
    drop_fields,
    launch_options,
    set_field,
)
from safetensors.torch import load_file

from draft_opd_trl.drafters import DFlashConfig, DFlashDraftModel, create_drafter
from draft_opd_trl.drafters.dflash_config import default_layer_ids
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import LOADERS


@pytest.mark.parametrize(
    ("num_target_layers", "num_draft_layers", "expected"),
    [(36, 5, [1, 9, 17, 25, 33]), (28, 5, [1, 7, 13, 19, 25]), (36, 1, [18]), (28, 1, [14])],
)
def test_default_layer_ids(num_target_layers, num_draft_layers, expected):
    assert default_layer_ids(num_target_layers, num_draft_layers) == expected


def test_config_has_the_published_layout(target):
    config = DFlashConfig.from_target(target.config, mask_token_id=47, block_size=8, num_hidden_layers=2)
    written = json.loads(config.to_json_string(use_diff=False))
    assert written["architectures"] == ["DFlashDraftModel"]
    assert written["model_type"] == "qwen3"
    assert written["block_size"] == 8
    assert written["num_target_layers"] == 4
    assert written["dflash_config"] == {"mask_token_id": 47, "target_layer_ids": [1, 1]}
    assert written["tie_word_embeddings"] is False
    assert written["layer_types"] == ["full_attention"] * 2
    rope = target.config.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    assert written["rope_theta"] == theta == written["rope_parameters"]["rope_theta"]


def test_config_round_trip(qwen_target, tmp_path):
    config = DFlashConfig.from_target(
        qwen_target.config, mask_token_id=47, block_size=7, num_hidden_layers=2, target_layer_ids=[0, 2]
    )
    config.rope_parameters["rope_theta"] = 12345.0
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 12345.0
    back = DFlashConfig.from_pretrained(tmp_path)
    assert back.target_layer_ids == [0, 2] and back.mask_token_id == 47 and back.block_size == 7
    assert back.rope_parameters["rope_theta"] == 12345.0
    assert {**back.to_dict(), "architectures": None} == {**config.to_dict(), "architectures": None}


def test_an_older_config_with_top_level_rope_theta_only(qwen_target, tmp_path):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=47).to_dict()
    config.pop("rope_parameters")
    config["rope_theta"] = 777.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert DFlashConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 777.0


# Field → value for the tiny drafter, and where it is read: SGLang 0.5.23 (in sglang/srt/), vLLM 0.33.0 (in vllm/).
CONTRACT = {
    "architectures": ["DFlashDraftModel"],  # sglang models/dflash.py:1317; vllm .../configs/eagle.py
    "model_type": "qwen3",  # both: AutoConfig, before anything else
    "block_size": 5,  # sglang speculative/dflash_utils.py:610
    "num_target_layers": 4,  # sglang speculative/dflash_utils.py:599
    "dflash_config.target_layer_ids": [1, 2],  # sglang dflash_utils.py:658; vllm v1/.../eagle/eagle3_utils.py:124
    "dflash_config.mask_token_id": 47,  # sglang dflash_utils.py:689; vllm v1/worker/gpu/spec_decode/utils.py:101
    "layer_types": ["full_attention"] * 2,  # sglang get_dflash_layer_types; vllm qwen3_dflash.py:70
    "hidden_act": "silu",  # sglang models/dflash.py:DFlashMLP
}
KEYS = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
    f"layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("input_layernorm", "post_attention_layernorm")
    + tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
}


def test_the_written_folder(qwen_target, tmp_path):
    tiny_drafter("dflash", qwen_target).save_pretrained(tmp_path)
    tensors = assert_written_for_engines(tmp_path, CONTRACT, KEYS)
    assert tensors["fc.weight"].shape == (32, 2 * 32)
    config = json.loads((tmp_path / "config.json").read_text())
    # vLLM reads these where they are present, and drafts otherwise: qwen3_dflash.py:60, sglang models/dflash.py.
    assert not {"is_causal", "use_swa", "draft_is_causal"} & {*config, *config["dflash_config"]}


def test_sft_decay_is_the_published_recipe(qwen_target):
    # exp(−(k − 1) / 7) at block 16, 4 at blocks of 7 or 8.
    assert tiny_drafter("dflash", qwen_target, block_size=16).sft_decay == pytest.approx(0.8668779)
    assert tiny_drafter("dflash", qwen_target, block_size=8).sft_decay == pytest.approx(0.7788008)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16}, "drafter hidden_size 16 is not the target's 32"),
        ({"vocab_size": 40}, "drafter vocab_size 40 is not the target's 48"),
        ({"num_target_layers": 6}, "drafter was made for 6 target layers, this one has 4"),
        ({"taps": [1, 3]}, r"target_layer_ids \[1, 3\] must name layers 0 … 2"),
        ({"taps": [-1, 1]}, r"target_layer_ids \[-1, 1\] must name layers 0 … 2"),
        ({"mask": 48}, "mask_token_id 48 is not a token of the target's vocabulary of 48"),
        ({"mask": None}, "mask_token_id None is not a token"),
        ({"block_size": 1}, "block_size 1 leaves no slot to propose"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(qwen_target, changes, message):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=47, block_size=5, num_hidden_layers=1)
    config.dflash_config["target_layer_ids"] = changes.pop("taps", config.target_layer_ids)
    config.dflash_config["mask_token_id"] = changes.pop("mask", 47)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message) as caught:
        DFlashDraftModel(config).bind(qwen_target)
    assert "Take the drafter made for this target, or make one with `create_drafter`" in str(caught.value)


def test_every_fault_is_named_at_once(qwen_target):
    config = DFlashConfig.from_target(qwen_target.config, mask_token_id=99, block_size=1, num_hidden_layers=1)
    with pytest.raises(ValueError, match="mask_token_id 99.*block_size 1"):
        DFlashDraftModel(config).bind(qwen_target)


@pytest.mark.parametrize(
    "overrides", [{"hidden_size": 16, "head_dim": 8}, {"vocab_size": 40}, {"target_layer_ids": [3]}]
)
def test_create_drafter_explains_what_does_not_fit(qwen_target, overrides):
    with pytest.raises(ValueError, match="does not fit the target"):
        create_drafter("dflash", qwen_target, mask_token_id=47, **{"num_hidden_layers": 1, **overrides})


def test_a_drafter_deeper_than_its_target_can_be_made(qwen_target):
    assert len(create_drafter("dflash", qwen_target, mask_token_id=47, num_hidden_layers=6).layers) == 6


@pytest.mark.parametrize(
    ("option", "near"),
    [("num_layers", "'num_hidden_layers'"), ("block_sizes", "'block_size'"), ("atention_bias", "'attention_bias'")],
)
def test_a_misspelt_option_is_not_swallowed(qwen_target, option, near):
    with pytest.raises(TypeError, match=f"DFlashConfig has no option '{option}'. Did you mean {near}"):
        create_drafter("dflash", qwen_target, mask_token_id=3, **{option: 2})


# -- speculators ---------------------------------------------------------------------------------------------------


def test_a_speculators_folder(qwen_target, target_folder, tmp_path):
    drafter = tiny_drafter("dflash", qwen_target)
    drafter.save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    config = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert config["sliding_window_non_causal"] is True and config["sample_from_anchor"] is False
    assert config["block_size"] == 5 and config["mask_token_id"] == 47
    # Four target layers: layer 1's output is hidden_states[2]. Both engines agree on DFlash's flat count.
    assert config["aux_hidden_state_layer_ids"] == [2, 3]
    assert "dflash_config" not in config["transformer_layer_config"]
    assert load_file(tmp_path / "spec" / "model.safetensors").keys() == KEYS
    assert load_drafter(str(tmp_path / "spec")).target_layer_ids == [1, 2]


@pytest.mark.parametrize("name", ["transformer_layer_config", "mask_token_id", "aux_hidden_state_layer_ids"])
def test_a_speculators_config_that_lacks_a_field(name):
    config = {"transformer_layer_config": {}, "block_size": 4, "mask_token_id": 1, "aux_hidden_state_layer_ids": [1]}
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\]"):
        DFlashConfig.from_speculators({key: value for key, value in config.items() if key != name})


# -- what is not computed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dflash_config": {"sample_from_anchor": True}}, "'dflash_config.sample_from_anchor': True"),
        ({"dflash_config": {"attention_value_scale": 0.7}}, "'dflash_config.attention_value_scale': 0.7"),
        ({"dflash_config": {"use_aux_hidden_state": False}}, "'dflash_config.use_aux_hidden_state': False"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "'layer_types'"),
        ({"is_causal": True}, "'is_causal': True"),
        ({"draft_vocab_size": 100}, "'draft_vocab_size': 100"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "'rope_scaling'"),
    ],
)
def test_a_config_that_asks_for_what_is_not_computed(fields, message):
    with pytest.raises(ValueError, match=message):
        DFlashConfig(**{"num_hidden_layers": 2, **fields})


def test_newer_folders_keep_the_block_size_inside():
    config = DFlashConfig(num_hidden_layers=2, dflash_config={"block_size": 8, "num_target_layers": 28})
    assert (config.block_size, config.num_target_layers, config.target_layer_ids) == (8, 28, [1, 25])
    assert DFlashConfig(num_hidden_layers=2, num_target_layers=28, dflash_config={"target_layer_ids": None}) == (
        DFlashConfig(num_hidden_layers=2, num_target_layers=28)
    )
    assert config.tie_word_embeddings is False
    assert DFlashConfig(tie_word_embeddings=True).tie_word_embeddings is False


# -- what engines make of a folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words", "breaks"),
    [
        (set_field("dflash_config.mask_token_id", 48), "mask_token_id 48 is not a token", set(LOADERS)),
        (set_field("dflash_config.target_layer_ids", [1, 3]), "must name layers 0 … 2", set(LOADERS)),
        (set_field("dflash_config.sample_from_anchor", True), "asks for what is not computed here", set(LOADERS)),
        (set_field("dflash_config.target_layer_ids", None), "taps EAGLE-3's layers", {"vLLM"}),
        (drop_fields("block_size"), "no block_size, so 16 is assumed", set()),
        (set_field("tie_word_embeddings", True), "nothing to tie", set()),
    ],
)
def test_a_config_that_an_engine_reads_otherwise(make_folder, change, words, breaks):
    assert_config_fault(make_folder("dflash", change), words, breaks)


@pytest.mark.parametrize(("family", "refuse"), [("qwen3", set()), ("llama", set()), ("gemma3", {"SGLang", "vLLM"})])
def test_engines_that_refuse_the_target_are_not_promised(family, refuse, tmp_path):
    assert_engines_refuse("dflash", family, refuse, tmp_path)


def test_the_engines_are_told_what_it_is(make_folder):
    folder = make_folder("dflash")
    vllm, sglang = launch_options(folder)
    assert vllm == {"method": "dflash", "model": folder, "num_speculative_tokens": 4}
    assert sglang == {
        "--model-path": "TARGET",
        "--speculative-draft-model-path": folder,
        "--speculative-algorithm": "DFLASH",
    }
