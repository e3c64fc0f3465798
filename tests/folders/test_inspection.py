"""What inspection says of folders that are right, and of every way in which one can be wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import IN_SPECULATORS, TRAVELLING
from peft import LoraConfig
from readers import assert_config_fault, drop_fields, set_field
from safetensors.torch import load_file, save_file

from draft_opd_trl.commands import export as export_command
from draft_opd_trl.commands import inspect as inspect_command
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import LOADERS, inspect_drafter
from draft_opd_trl.training.loading import add_adapter


@pytest.fixture
def target_folder(target_folder):
    return str(target_folder)


def _tensors(folder, change):
    """`change(tensors, name)`, of which `name` is a vector as wide as the target; returns it."""
    tensors = load_file(f"{folder}/model.safetensors")
    name = min(name for name, tensor in tensors.items() if tensor.shape == (32,))
    change(tensors, name)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return name


def test_a_folder_that_is_right(kind, make_folder, target_folder):
    folder = make_folder(kind)
    layout = DRAFTERS[kind].config_class.layout(json.loads((Path(folder) / "config.json").read_text()))
    for target in (None, target_folder):
        told = inspect_drafter(folder, target)
        assert told["faults"] == []
        assert told["loads"] == dict.fromkeys(LOADERS, True)
        assert told["kind"] == kind and told["layout"] == layout
        assert told["config"]["num_draft_tokens"] == 4
        assert told["config"]["target_layer_ids"] == load_drafter(folder).target_layer_ids
        assert (told["target_family"] is None) == (target is None)
        name = target or "TARGET"
        assert told["launch"] and all(f" {name} " in text and folder in text for text in told["launch"].values())
    json.dumps(told)
    assert told["target_family"].startswith("qwen3, tried tiny and at random with transformers ")
    assert f"target: {told['target_family']}" in inspect_command.show(told)


@pytest.mark.parametrize("kind", IN_SPECULATORS)
def test_a_speculators_folder(kind, make_folder, target_folder, tmp_path_factory):
    spec = str(tmp_path_factory.mktemp("spec") / "spec")
    export_drafter(make_folder(kind), spec, "speculators", target=target_folder)
    told = inspect_drafter(spec)
    assert [fault["breaks"] for fault in told["faults"]] == [["SGLang", "transformers"], []]
    assert "named by a path" in told["faults"][1]["fault"]
    assert told["layout"] == "speculators (vLLM)"
    assert [loader for loader, loads in told["loads"].items() if loads] == ["draft_opd_trl", "vLLM"]
    assert list(told["launch"]) == ["vLLM"] and f"vllm serve {target_folder} " in told["launch"]["vLLM"]


@pytest.mark.parametrize(
    ("change", "words", "breaks"),
    [
        (set_field("hidden_act", "gelu"), "engines compute silu alone", {"SGLang", "vLLM"}),
        (set_field("rope_theta", 5.0), "rope_theta is 5.0 at the top level and 10000.0", {"SGLang", "vLLM"}),
        (drop_fields("rope_theta", "rope_parameters"), "no rope_theta is written", {"SGLang", "vLLM"}),
        (drop_fields("auto_map"), "the code that AutoModel needs", {"transformers"}),
    ],
)
@pytest.mark.parametrize("kind", TRAVELLING)
def test_a_config_that_is_wrong(make_folder, kind, change, words, breaks):
    assert_config_fault(make_folder(kind, change), words, breaks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, name: tensors.pop(name), "Missing: ['{name}']"),
        (lambda tensors, name: tensors.update({f"x.{name}": tensors.pop(name)}), "Unexpected: ['x.{name}']"),
        (lambda tensors, name: tensors.update({name: torch.ones(7)}), "{name} is [7], not [32]"),
        (lambda tensors, name: tensors[name].fill_(torch.nan), "not finite in ['{name}']"),
    ],
)
def test_tensors_that_are_wrong(kind, make_folder, change, words):
    folder = make_folder(kind)
    name = _tensors(folder, change)
    told = inspect_drafter(folder)
    (fault,) = told["faults"]
    assert words.format(name=name) in fault["fault"] and fault["breaks"] == sorted(LOADERS)
    assert not any(told["loads"].values()) and told["launch"] == {}


def test_several_dtypes(kind, make_folder):
    folder = make_folder(kind)
    _tensors(folder, lambda tensors, name: tensors.update({name: tensors[name].bfloat16()}))
    told = inspect_drafter(folder)
    (fault,) = told["faults"]
    assert "several dtypes" in fault["fault"] and fault["breaks"] == []
    assert told["dtypes"]["bfloat16"] == 1


def test_what_only_the_target_tells(kind, make_folder, target_folder):
    folder = make_folder(kind, set_field("max_position_embeddings", 100))
    assert inspect_drafter(folder)["faults"] == []
    (fault,) = inspect_drafter(folder, target_folder)["faults"]
    assert "100 is less than the target's 256" in fault["fault"] and fault["breaks"] == ["SGLang"]


def test_a_folder_of_something_else(target_folder):
    with pytest.raises(ValueError, match="holds a plain Qwen3ForCausalLM and no drafter"):
        inspect_drafter(target_folder)


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(kind, make_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    add_adapter(load_drafter(make_folder(kind)), config).save_pretrained(folder)
    return str(folder)


def test_an_adapter_is_judged_as_one(kind, adapter, tmp_path, target_folder):
    told = inspect_drafter(adapter, target_folder)
    assert told["layout"] == "adapter (LORA)" and told["base"] == str(tmp_path) and told["kind"] == kind
    (fault,) = told["faults"]
    assert f"`draft-opd export {adapter} --output_dir DIR --format {kind}` writes one" in fault["fault"]
    assert [loader for loader, loads in told["loads"].items() if loads] == ["draft_opd_trl"]
    assert told["launch"] == {} and told["config"]["num_draft_tokens"] == 4
    assert f"trained on {tmp_path}" in inspect_command.show(told)
    json.dumps(told)


def test_an_adapter_whose_drafter_is_gone(kind, adapter, tmp_path):
    shutil.rmtree(tmp_path)
    told = inspect_drafter(adapter)
    assert not any(told["loads"].values()) and told["kind"] is None
    assert any(
        f"was trained on the drafter '{tmp_path}', which is not there" in one["fault"] for one in told["faults"]
    )
    assert "unknown drafter, adapter (LORA)" in inspect_command.show(told)


@pytest.mark.parametrize("kind", TRAVELLING)
def test_code_that_is_not_whole(kind, make_folder):
    folder = make_folder(kind)
    (Path(folder) / "errors.py").unlink()
    (fault,) = inspect_drafter(folder)["faults"]
    assert "the code that AutoModel needs" in fault["fault"] and fault["breaks"] == ["transformers"]


def test_a_stray_file_of_weights(kind, make_folder):
    folder = make_folder(kind)
    tensors = load_file(f"{folder}/model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, f"{folder}/stray.safetensors")
    (fault,) = inspect_drafter(folder)["faults"]
    assert "['stray.safetensors'] are not its weights" in fault["fault"] and fault["breaks"] == ["SGLang", "vLLM"]


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_SPECULATORS)
def test_the_commands_call_what_they_are_named_after(kind, make_folder, target_folder, tmp_path_factory):
    folder, out = make_folder(kind), str(tmp_path_factory.mktemp("out") / "spec")
    (arguments,) = inspect_command.ARGUMENTS
    assert [field.name for field in dataclasses.fields(arguments) if field.metadata.get("positional")] == ["path"]
    result = inspect_command.run(arguments(path=folder, target=target_folder))
    assert result == inspect_drafter(folder, target_folder)
    shown = inspect_command.show(result)
    assert f"{kind} drafter, flat" in shown and "SGLang: yes" in shown and "Nothing is wrong with it." in shown
    assert "  vllm serve" in shown

    (arguments,) = export_command.ARGUMENTS
    result = export_command.run(arguments(path=folder, output_dir=out, format="speculators", target=target_folder))
    assert result == inspect_drafter(out, target_folder)
    shown = export_command.show(result)
    assert shown.startswith("Written and read back.") and "(breaks SGLang, transformers)" in shown
