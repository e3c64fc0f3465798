"""DFlash configs and folders (FIELD section 3): what is written, what fits, and what is refused by name."""

import json

import pytest
from conftest import tiny_drafter

from draft_opd_trl.drafters import DFlashConfig, DFlashDraftModel, create_drafter
from draft_opd_trl.drafters.dflash_config import default_layer_ids


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


def test_exact_key_set(qwen_target):
    drafter = tiny_drafter("dflash", qwen_target)
    expected = {"fc.weight", "hidden_norm.weight", "norm.weight"}
    for layer in range(2):
        expected |= {f"layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        expected |= {f"layers.{layer}.self_attn.{name}.weight" for name in ("q_norm", "k_norm")}
        expected |= {f"layers.{layer}.self_attn.{name}_proj.weight" for name in "qkvo"}
        expected |= {f"layers.{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert set(drafter.state_dict()) == expected
    assert drafter.state_dict()["fc.weight"].shape == (32, 2 * 32)


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
