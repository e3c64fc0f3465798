"""A target's folder: what is wrong with its config, weights and tokenizer, by name. What commands show of that is in
test_mistakes.py."""

import json

import pytest
import torch
from conftest import TRAVELLING, save_target, tiny_drafter
from transformers import AutoModelForCausalLM

from draft_opd_trl.core.errors import EnvironmentFault, InputError, NotFoundError
from draft_opd_trl.folders.target_folder import read_target, read_target_config, read_tokenizer


@pytest.fixture
def folder(qwen_target, tmp_path):
    save_target(qwen_target.model, tmp_path / "target")
    return tmp_path / "target"


def test_a_folder_that_is_right(folder, qwen_target):
    config = read_target_config(str(folder))
    assert config.model_type == "qwen3"
    model = loading(folder)
    assert torch.equal(model.lm_head.weight, qwen_target.model.lm_head.weight)
    assert read_tokenizer(str(folder), config).eos_token == "<|end|>"


# A plain model of transformers can be either.
@pytest.mark.parametrize("kind", TRAVELLING)
def test_a_drafters_folder_is_no_targets(kind, qwen_target, tmp_path):
    tiny_drafter(kind, qwen_target).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"holds a drafter of kind {kind}. Drafter and target look swapped"):
        read_target_config(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda file: file.unlink(), NotFoundError, "holds no config.json, so it is no model's folder"),
        (lambda file: file.write_text("{"), InputError, "target's config .*/config.json cannot be read"),
        (lambda file: file.write_text('{"model_type": "zz"}'), InputError, "is of no model that can be made here"),
    ],
    ids=["gone", "torn", "unknown"],
)
def test_a_config_that_is_wrong(folder, change, error, words):
    change(folder / "config.json")
    with pytest.raises(error, match=words) as raised:
        read_target_config(str(folder))
    assert "\n" not in str(raised.value)


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(NotFoundError, match="is no folder here and could not be fetched from the Hub .it is no id"):
        read_target_config(str(tmp_path / "nowhere"))


def loading(folder):
    return read_target(str(folder), AutoModelForCausalLM.from_pretrained)


def test_weights_that_are_cut_off_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"weights {file} are damaged or cut off"):
        loading(folder)


def test_weights_that_are_missing_would_be_random(folder):
    config = json.loads((folder / "config.json").read_text())
    deeper = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (folder / "config.json").write_text(json.dumps({**config, **deeper}))
    with pytest.raises(InputError, match="lacks .* of its weights, such as model.layers.4.*which would be random"):
        loading(folder)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ImportError("needs\nx"), EnvironmentFault),
        (ValueError("odd"), InputError),
        (TypeError("got an unexpected keyword argument 'wings'"), InputError),
        (RuntimeError("size mismatch"), InputError),
        (OSError("no such file in the repository"), InputError),
        # Faults of the code, of memory and of the disk are not the folder's.
        (TypeError("unsupported operand"), TypeError),
        (RuntimeError("out of memory"), RuntimeError),
        (OSError(28, "No space left on device"), OSError),
    ],
    ids=["package", "value", "option", "shape", "files", "code", "memory", "disk"],
)
def test_what_a_library_raises_is_told_as_the_folders_where_it_is(raised, told):
    def load(name, **options):
        raise raised

    with pytest.raises(told) as caught:
        read_target("somewhere", load)
    assert (caught.value is raised) == (told in (TypeError, RuntimeError, OSError))
    assert caught.value is raised or ("The target somewhere" in str(caught.value) and "\n" not in str(caught.value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], "without a tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "could not be read"),
    ],
    ids=["none", "torn"],
)
def test_a_tokenizer_that_is_wrong(folder, change, words):
    change(folder)
    with pytest.raises(InputError, match=f"{words}.*Put its files beside the weights"):
        read_tokenizer(str(folder))


def test_a_tokenizer_of_another_model(folder):
    config = read_target_config(str(folder))
    config.vocab_size = 8
    with pytest.raises(InputError, match="has 32 tokens, but the target's vocabulary is 8, so it is another model's"):
        read_tokenizer(str(folder), config)
