"""Drafter folders: save → load → same proposals, and every way in which a folder can be wrong, by name."""

import json
import re

import pytest
import torch
from conftest import TRAVELLING, VOCAB, tiny_drafter, tiny_model
from invariants import assert_saves_and_loads
from safetensors.torch import load_file, save_file

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.folders.checkpoints import check_tensors, drafter_folder, load_drafter


@pytest.fixture
def folder(qwen_drafter, tmp_path):
    qwen_drafter.save_pretrained(tmp_path)
    return tmp_path


def _rewrite(folder, change):
    """`change(tensors, name)`, of which `name` is a vector as wide as the target; returns it."""
    tensors = load_file(folder / "model.safetensors")
    name = min(name for name, tensor in tensors.items() if tensor.shape == (32,))
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def test_save_then_load_proposes_the_same(target, drafter, tmp_path):
    """Invariant 7, save/load part."""
    assert_saves_and_loads(target, drafter, tmp_path)


@pytest.mark.parametrize("kind", TRAVELLING, indirect=True)
def test_the_saved_folder_holds_the_drafter_alone(qwen_drafter, folder):
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == qwen_drafter.state_dict().keys()
    assert not any("embed_tokens" in name for name in tensors)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(qwen_drafter).__name__]
    assert config["rope_theta"] == qwen_drafter.config.rope_parameters["rope_theta"]


def test_loading_leaves_nothing_uninitialised_and_is_ready_for_use(folder):
    loaded = load_drafter(str(folder))
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert not loaded.training
    assert loaded.config._name_or_path == str(folder)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), (torch.bfloat16, torch.bfloat16), ("auto", torch.bfloat16)]
)
def test_dtype(qwen_target, kind, tmp_path, dtype, expected):
    tiny_drafter(kind, qwen_target).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_drafter(str(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    # Rotary frequencies rounded to bfloat16 would turn far positions by the wrong angle.
    assert {buffer.dtype for name, buffer in loaded.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_dtype_that_is_none(folder):
    with pytest.raises(ValueError, match="dtype 'bf16' is none of PyTorch's"):
        load_drafter(str(folder), dtype="bf16")


def test_a_missing_tensor_is_named(folder):
    name = _rewrite(folder, lambda tensors, name: tensors.pop(name))
    told = rf"Missing: \['{name}'\]. Unexpected: none. Wrong shape: none. Wrong dtype: none"
    with pytest.raises(ValueError, match=told):
        load_drafter(str(folder))


def test_an_unexpected_tensor_is_named(folder):
    name = _rewrite(folder, lambda tensors, name: tensors.update({f"another.{name}": torch.ones(3)}))
    with pytest.raises(ValueError, match=rf"Missing: none. Unexpected: \['another.{name}'\]"):
        load_drafter(str(folder))


def test_a_misshapen_tensor_is_named(folder):
    name = _rewrite(folder, lambda tensors, name: tensors.update({name: torch.ones(7)}))
    with pytest.raises(ValueError, match=rf"Wrong shape: \['{name} is \[7\], not \[32\]'\].*Re-export"):
        load_drafter(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(folder, value):
    name = _rewrite(folder, lambda tensors, name: tensors[name].__setitem__(3, value))
    with pytest.raises(ValueError, match=rf"not finite in \['{name}'\]; the checkpoint is damaged"):
        load_drafter(str(folder))


@pytest.mark.parametrize(
    ("field", "text", "words"),
    [
        ("hidden_size", '"32"', "hidden_size is '32', but must be a whole number from 1 to 65536"),
        ("num_hidden_layers", "1000000", "num_hidden_layers is 1000000, but must be"),
        ("vocab_size", "-1", "vocab_size is -1, but must be"),
        ("rms_norm_eps", "1e400", "rms_norm_eps is inf, but must be a number above 0"),
        ("rms_norm_eps", "NaN", "NaN is not a number that JSON knows"),
        ("rope_parameters", '{"rope_theta": "x"}', "rope_parameters.rope_theta is 'x', but must be a number"),
        ("tie_word_embeddings", "0", "tie_word_embeddings is 0, but must be true or false"),
        ("architectures", '"Mine"', "architectures is 'Mine', but must be a list of strings"),
        ("hidden_act", '"x"', "hidden_act is 'x', which transformers does not know"),
        ("num_key_value_heads", "3", "make no attention"),
        ("x", "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_its_file(folder, field, text, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: "HERE"}).replace('"HERE"', text))
    with pytest.raises(InputError, match=rf"{re.escape(str(folder / 'config.json'))}.*{re.escape(words)}"):
        load_drafter(str(folder))


def test_sizes_are_compared_with_the_tensors_before_memory_is_taken(folder):
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": 2**16, "intermediate_size": 2**20, "num_attention_heads": 2**12, "head_dim": 2**12}
    (folder / "config.json").write_text(json.dumps({**config, **sizes, "target_hidden_size": 2**16}))
    with pytest.raises(InputError, match="weight is .32., not .65536."):
        load_drafter(str(folder))


def test_damaged_weights_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for data in (whole[:-7], b"", b"x" * 99):
        file.write_bytes(data)
        with pytest.raises(InputError, match=rf"{re.escape(str(file))} is damaged or cut short .*Download or save"):
            load_drafter(str(folder))


def test_stray_weights_change_nothing(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / "zzz.safetensors")
    loaded = load_drafter(str(folder))
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", torch.int32, 7])
def test_a_dtype_that_holds_no_weights(folder, dtype):
    with pytest.raises(InputError, match="none of PyTorch's floating-point types of 16 bits or more"):
        load_drafter(str(folder), dtype=dtype)


def test_several_faults_at_once():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(4), "d": torch.zeros(1, dtype=torch.bool)}
    found = {"b": torch.zeros(5), "c": torch.zeros(4), "d": torch.zeros(1), "e": torch.zeros(1)}
    message = (
        r"tensors in here .*Missing: \['a'\].*\['e'\].*\['b is \[5\], not \[3\]'\].*"
        r"\['d is torch.float32, not torch.bool'\]"
    )
    with pytest.raises(ValueError, match=message):
        check_tensors(expected, found, "here")
    check_tensors(expected, {**expected, "a": torch.zeros(2, dtype=torch.bfloat16)}, "here")
    with pytest.raises(ValueError, match="a is torch.float8_e4m3fn, not torch.float32"):
        check_tensors(expected, {**expected, "a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "here")


def test_a_targets_folder_is_not_a_drafters(tmp_path):
    tiny_model("qwen3").save_pretrained(tmp_path)
    way = r"draft-opd export \S+ --format \w+ --target TARGET --output_dir DIR` makes a drafter of it"
    with pytest.raises(ValueError, match=f"holds a plain Qwen3ForCausalLM and no drafter.*{way}.*If it is the target"):
        load_drafter(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match=r"architectures \['BertModel'\], none of which.*not of a target\?"):
        load_drafter(str(tmp_path))


def test_a_folder_without_config_or_weights(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match="holds no config.json, so it is not a drafter folder"):
        load_drafter(str(empty))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*.safetensors file"):
        load_drafter(str(folder))


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-drafter' is not a folder here and could not be fetched"):
        load_drafter(str(tmp_path / "no-such-drafter"))
    assert drafter_folder(str(tmp_path)) == tmp_path


def test_a_loaded_drafter_is_checked_against_its_target(folder, target):
    loaded = load_drafter(str(folder))
    assert loaded.bind(target).target is target
    loaded.config.vocab_size = VOCAB + 1
    with pytest.raises(ValueError, match="vocab_size 49 is not the target's 48"):
        loaded.bind(target)
