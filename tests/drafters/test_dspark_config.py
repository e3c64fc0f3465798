"""DSpark configs and folders (FIELD section 12): three spellings read, what is written, what is refused by name."""

import json

import pytest
import torch
from conftest import tiny_drafter
from invariants import assert_same_drafter
from readers import (
    assert_config_fault,
    assert_engines_refuse,
    assert_written_for_engines,
    drop_fields,
    launch_options,
    set_field,
)
from safetensors.torch import load_file, save_file

from draft_opd_trl.drafters.dspark_config import DSparkConfig
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import LOADERS, inspect_drafter


# Field → value for the tiny drafter, and where it is read: SGLang 0.5.23 (in sglang/srt/), vLLM 0.33.0 (in vllm/).
CONTRACT = {
    "architectures": ["Qwen3DSparkModel"],  # sglang models/dspark.py:995; vllm .../models/registry.py:681
    "model_type": "qwen3",  # both: AutoConfig, before anything else
    "block_size": 4,  # sglang speculative/dflash_utils.py:610; vllm config/speculative.py:1595
    "num_target_layers": 4,  # sglang speculative/dflash_utils.py:599
    "target_layer_ids": [1, 2],  # sglang dflash_utils.py:658; vllm v1/.../eagle/eagle3_utils.py:140
    "mask_token_id": 47,  # sglang .../dspark_config.py:resolve_runtime_config; vllm v1/.../spec_decode/utils.py:104
    "markov_rank": 6,  # sglang models/dspark.py:build_markov_head; vllm .../models/qwen3_dspark.py:214
    "markov_head_type": "vanilla",  # sglang models/dspark.py:build_markov_head; vllm computes no other
    "enable_confidence_head": True,  # vllm .../models/qwen3_dspark.py:223
    "confidence_head_with_markov": True,  # sglang models/dspark.py:build_confidence_head; vllm .../qwen3_dspark.py:224
    "sample_from_anchor": True,  # sglang .../dspark_config.py:29; vllm v1/.../dspark/speculator.py:49
    "num_anchors": 512,  # DeepSpec's own class asserts it
    "layer_types": ["full_attention"] * 2,  # sglang get_dflash_layer_types; vllm qwen3_dflash.py:70
    "hidden_act": "silu",  # sglang models/dflash.py:DFlashMLP
}
BACKBONE = {"fc.weight", "hidden_norm.weight", "norm.weight"} | {
    f"layers.{layer}.{name}.weight"
    for layer in range(2)
    for name in ("input_layernorm", "post_attention_layernorm")
    + tuple(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
}
MARKOV = {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
CONFIDENCE = {"confidence_head.proj.weight", "confidence_head.proj.bias"}


def test_the_written_folder(qwen_target, tmp_path):
    tiny_drafter("dspark", qwen_target).save_pretrained(tmp_path)
    tensors = assert_written_for_engines(tmp_path, CONTRACT, BACKBONE | MARKOV | CONFIDENCE)
    assert tensors["markov_head.markov_w1.weight"].shape == tensors["markov_head.markov_w2.weight"].shape == (48, 6)
    assert tensors["confidence_head.proj.weight"].shape == (1, 32 + 6)
    config = json.loads((tmp_path / "config.json").read_text())
    # In which engines would look first, and vLLM for causal blocks and sliding windows.
    assert not {"dflash_config", "is_causal", "draft_vocab_size"} & config.keys()


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"markov_head_type": "gated"}, {"gate_proj.weight": (6, 38), "gate_proj.bias": (6,)}),
        ({"markov_head_type": "rnn"}, {"joint_proj.weight": (18, 44), "joint_proj.bias": (18,)}),
        ({"enable_confidence_head": False}, {}),
    ],
)
def test_the_tensors_of_other_heads(qwen_target, options, shapes):
    tensors = tiny_drafter("dspark", qwen_target, **options).state_dict()
    confidence = CONFIDENCE if options.get("enable_confidence_head", True) else set()
    assert tensors.keys() == BACKBONE | MARKOV | confidence | {f"markov_head.{name}" for name in shapes}
    assert all(tensors[f"markov_head.{name}"].shape == shape for name, shape in shapes.items())
    alone = tiny_drafter("dspark", qwen_target, confidence_head_with_markov=False)
    assert alone.confidence_head.proj.weight.shape == (1, 32)


def test_new_ones_are_the_published(qwen_target):
    config = DSparkConfig.from_target(qwen_target.config, mask_token_id=47)
    assert (config.block_size, config.markov_rank, config.markov_head_type) == (7, 256, "vanilla")
    assert config.num_hidden_layers == 5 and config.target_layer_ids == [1, 1, 1, 1, 1]


# -- the layouts that are read -------------------------------------------------------------------------------------

HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def _as_specforge(config):
    """The fields of its own that a flat folder has, moved into `dflash_config` as SpecForge writes them."""
    names = ("mask_token_id", "target_layer_ids", *HEADS)
    config["dflash_config"] = {name: config.pop(name) for name in names}
    config["dflash_config"] |= {"projector_type": "dspark", "attention_mode": "gqa", "confidence_head_alpha": 1.0}
    config["architectures"] = ["DSparkDraftModel"]
    drop_fields("auto_map", "sample_from_anchor", "num_anchors")(config)


def _with_nested_slots(config):
    drop_fields("sample_from_anchor")(config)
    config["dflash_config"] = {"sample_from_anchor": False}


def _as_deepspec(config):
    """Made from a copy of the target's config, some of which says nothing of a drafter."""
    config |= {"max_window_layers": 28, "attention_dropout": 0.0, "eos_token_id": 3, "num_anchors": 256}
    drop_fields("auto_map", "sample_from_anchor")(config)


@pytest.mark.parametrize("spelled", [_as_specforge, _as_deepspec])
def test_the_folders_of_others(qwen_target, make_folder, tmp_path_factory, spelled):
    folder = make_folder("dspark", spelled)
    tensors = load_file(f"{folder}/model.safetensors")
    lent = {"embed_tokens.weight": torch.ones(48, 32), "lm_head.weight": torch.ones(48, 32)}
    save_file({**tensors, **lent}, f"{folder}/model.safetensors", metadata={"format": "pt"})
    drafter = tiny_drafter("dspark", qwen_target)
    assert_same_drafter(qwen_target, drafter, load_drafter(folder))
    written = tmp_path_factory.mktemp("out") / "flat"
    export_drafter(folder, str(written), "dspark")
    config = json.loads((written / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"] and "dflash_config" not in config
    assert all(config[name] == CONTRACT[name] for name in (*HEADS, "mask_token_id", "target_layer_ids"))
    assert load_file(written / "model.safetensors").keys() == BACKBONE | MARKOV | CONFIDENCE


def test_a_speculators_folder(qwen_target, target_folder, tmp_path):
    drafter = tiny_drafter("dspark", qwen_target)
    drafter.save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    config = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert config["speculators_model_type"] == "dspark" and config["sample_from_anchor"] is True
    assert config["block_size"] == config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["aux_hidden_state_layer_ids"] == [2, 3] and config["draft_vocab_size"] == 48
    assert [config[name] for name in HEADS] == [6, "vanilla", True, True]
    assert not {*HEADS, "target_layer_ids", "sample_from_anchor"} & config["transformer_layer_config"].keys()
    assert load_file(tmp_path / "spec" / "model.safetensors").keys() == BACKBONE | MARKOV | CONFIDENCE
    # Folders from before there was that field have the anchor's slot silent.
    del config["sample_from_anchor"]
    (tmp_path / "spec" / "config.json").write_text(json.dumps(config))
    loaded = load_drafter(str(tmp_path / "spec"))
    assert (loaded.config.sample_from_anchor, loaded.num_draft_tokens) == (False, 3)
    assert_config_fault(str(tmp_path / "spec"), "no sample_from_anchor: vLLM takes it for false", set())


def test_a_draft_vocabulary_in_both_layouts(qwen_target, target_folder, tmp_path):
    ids = [token for token in range(48) if token % 10 != 7]
    drafter = tiny_drafter("dspark", qwen_target, draft_token_ids=ids)
    drafter.save_pretrained(tmp_path / "flat")
    export_drafter(str(tmp_path / "flat"), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    for folder in (tmp_path / "flat", tmp_path / "spec"):
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        assert config["draft_vocab_size"] == 43 and "draft_token_ids" not in config
        assert "draft_vocab_size" not in config.get("transformer_layer_config", {})
        assert tensors.keys() == BACKBONE | MARKOV | CONFIDENCE | {"lm_head.weight", "d2t", "t2d"}
        assert (tensors["d2t"] + torch.arange(43)).tolist() == tensors["t2d"].nonzero()[:, 0].tolist() == ids
        assert_same_drafter(qwen_target, drafter, load_drafter(str(folder)))
        assert_config_fault(str(folder), "a draft vocabulary, which SGLang does not read for this kind", {"SGLang"})
        # A copy of the target's embeddings says nothing.
        tensors["embed_tokens.weight"] = torch.ones(48, 32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(load_drafter(str(folder)).lm_head.weight, drafter.lm_head.weight)
    tensors["t2d"] = ~tensors["t2d"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="d2t and t2d do not hold the same tokens"):
        load_drafter(str(folder)).bind(qwen_target)


@pytest.mark.parametrize("name", ["transformer_layer_config", "mask_token_id", "markov_rank"])
def test_a_speculators_config_that_lacks_a_field(name):
    config = {"transformer_layer_config": {}, "block_size": 4, "mask_token_id": 1, "aux_hidden_state_layer_ids": [1]}
    config |= {"markov_rank": 4, "markov_head_type": "vanilla"}
    with pytest.raises(ValueError, match=rf"lacks \['{name}'\]"):
        DSparkConfig.from_speculators({key: value for key, value in config.items() if key != name})


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"markov_head_type": "fir"}, "'markov_head_type': 'fir'"),
        ({"markov_rank": 0}, "markov_rank is 0, but must be a whole number from 1"),
        ({"dflash_config": {"attention_sink_bias": True}}, "'dflash_config.attention_sink_bias': True"),
        ({"dflash_config": {"dspark_backbone_conv_enabled": True}}, "dspark_backbone_conv_enabled': True"),
        ({"dflash_config": {"use_aux_hidden_state": False}}, "'dflash_config.use_aux_hidden_state': False"),
        ({"dspark_markov_rank": 64}, "'dspark_markov_rank': 64"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "'layer_types'"),
        ({"is_causal": True}, "'is_causal': True"),
        ({"draft_vocab_size": 200_000}, "'draft_vocab_size': 200000"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "'rope_scaling'"),
    ],
)
def test_a_config_that_asks_for_what_is_not_computed(fields, message):
    with pytest.raises(ValueError, match=message):
        DSparkConfig(**{"num_hidden_layers": 2, **fields})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_layer_ids": [-1, 1]}, r"target_layer_ids \[-1, 1\] must name layers 0 … 2"),
        ({"mask_token_id": 48}, "mask_token_id 48 is not a token of the target's vocabulary of 48"),
        ({"sample_from_anchor": False, "block_size": 1}, "block_size 1 leaves no slot to propose; .* at least 2"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused(qwen_target, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_drafter("dspark", qwen_target, **options)
    assert tiny_drafter("dspark", qwen_target, block_size=1).num_draft_tokens == 1


# -- what engines make of a folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words", "breaks"),
    [
        (set_field("mask_token_id", 48), "mask_token_id 48 is not a token", set(LOADERS)),
        (set_field("markov_head_type", "rnn"), "Missing: ['markov_head.joint_proj.bias'", set(LOADERS)),
        (set_field("markov_head_type", "rnn"), "its Markov head is not vanilla", {"vLLM"}),
        (_as_specforge, "['markov_rank'] stand in dflash_config alone", {"SGLang", "vLLM"}),
        (_with_nested_slots, "['sample_from_anchor'] stand in dflash_config alone", {"SGLang", "vLLM"}),
        (drop_fields("markov_head_type"), "there is no markov_head_type, without which SGLang stops", {"SGLang"}),
        (drop_fields("confidence_head_with_markov"), "which vLLM then takes for false", {"vLLM"}),
        (set_field("model_type", "dspark"), "model_type is 'dspark'", {"SGLang", "vLLM"}),
        (drop_fields("enable_confidence_head"), "there is no enable_confidence_head", set()),
    ],
)
def test_a_config_that_an_engine_reads_otherwise(make_folder, change, words, breaks):
    assert_config_fault(make_folder("dspark", change), words, breaks)


def test_a_folder_without_a_rank_has_no_heads_in_engines():
    """Here it is 256, as published."""
    assert ("there is no markov_rank, and engines assume none", {"SGLang", "vLLM"}) in DSparkConfig.engine_faults(
        {"markov_head_type": "vanilla"}, set()
    )


def test_lent_tensors_are_told(make_folder):
    folder = make_folder("dspark")
    tensors = {**load_file(f"{folder}/model.safetensors"), "lm_head.weight": torch.ones(48, 32)}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    faults = inspect_drafter(folder)["faults"]
    assert [fault["breaks"] for fault in faults] == [[]] and "SGLang takes the target's" in faults[0]["fault"]


@pytest.mark.parametrize(("family", "refuse"), [("qwen3", set()), ("llama", set()), ("gemma3", {"SGLang", "vLLM"})])
def test_engines_that_refuse_the_target_are_not_promised(family, refuse, tmp_path):
    assert_engines_refuse("dspark", family, refuse, tmp_path)


@pytest.mark.parametrize("options", [{}, {"sample_from_anchor": False, "block_size": 5}])
def test_the_engines_are_told_what_it_is(make_folder, options):
    folder = make_folder("dspark", **options)
    vllm, sglang = launch_options(folder)
    assert vllm == {"method": "dspark", "model": folder, "num_speculative_tokens": 4}
    assert sglang == {
        "--model-path": "TARGET",
        "--speculative-draft-model-path": folder,
        "--speculative-algorithm": "DSPARK",
        "--speculative-dspark-block-size": "4",
    }
