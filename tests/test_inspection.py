"""What inspection says of folders that are right, and of every way in which one can be wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_drafter, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from draft_opd_trl.checkpoints import export_drafter, load_drafter
from draft_opd_trl.commands import export as export_command
from draft_opd_trl.commands import inspect as inspect_command
from draft_opd_trl.inspection import LOADERS, inspect_drafter
from draft_opd_trl.loading import add_adapter
from draft_opd_trl.serving import ENGINES
from draft_opd_trl.target import Target


@pytest.fixture(scope="module")
def target_folder(qwen_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    qwen_target.model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make(qwen_target, tmp_path):
    """`make(kind, change)`: a folder of that kind whose config went through `change`."""

    def folder(kind, change=lambda config: None, **options):
        tiny_drafter(kind, qwen_target, **options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return folder


def _tensors(folder, change):
    tensors = load_file(f"{folder}/model.safetensors")
    change(tensors)
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def test_a_folder_that_is_right(kind, make, target_folder):
    folder = make(kind)
    for target in (None, target_folder):
        told = inspect_drafter(folder, target)
        assert told["faults"] == []
        assert told["loads"] == dict.fromkeys(LOADERS, True)
        assert told["kind"] == kind and told["layout"] == "flat (SGLang, vLLM)"
        assert told["config"]["num_draft_tokens"] == 4
        assert told["config"]["target_layer_ids"] == ([1, 2] if kind == "dflash" else [0, 1, 2])
        name = target or "TARGET"
        assert told["launch"]["vLLM"].startswith(f"vllm serve {name} ")
        assert f"--speculative-algorithm {kind.upper()}" in told["launch"]["SGLang"]
        assert '"num_speculative_tokens": 4' in told["launch"]["vLLM"] and folder in told["launch"]["vLLM"]
    json.dumps(told)


def test_a_speculators_folder(kind, make, target_folder, tmp_path_factory):
    spec = str(tmp_path_factory.mktemp("spec") / "spec")
    export_drafter(make(kind), spec, "speculators", target=target_folder)
    told = inspect_drafter(spec)
    assert [fault["breaks"] for fault in told["faults"]] == [["SGLang", "transformers"], []]
    assert "named by a path" in told["faults"][1]["fault"]
    assert told["layout"] == "speculators (vLLM)"
    assert [loader for loader, loads in told["loads"].items() if loads] == ["draft_opd_trl", "vLLM"]
    assert list(told["launch"]) == ["vLLM"] and f"vllm serve {target_folder} " in told["launch"]["vLLM"]


def _set(path, value):
    *outer, name = path.split(".")

    def change(config):
        for part in outer:
            config = config[part]
        config[name] = value

    return change


def _drop(*names):
    return lambda config: [config.pop(name) for name in names]


EVERYONE = set(LOADERS)


@pytest.mark.parametrize(
    ("kind", "change", "words", "breaks"),
    [
        ("dflash", _set("dflash_config.mask_token_id", 48), "mask_token_id 48 is not a token", EVERYONE),
        ("dflash", _set("dflash_config.target_layer_ids", [1, 3]), "must name layers 0 … 2", EVERYONE),
        ("dflash", _set("dflash_config.sample_from_anchor", True), "asks for what is not computed here", EVERYONE),
        ("dflash", _set("dflash_config.target_layer_ids", None), "taps EAGLE-3's layers", {"vLLM"}),
        ("dflash", _drop("block_size"), "no block_size, so 16 is assumed", set()),
        ("dflash", _set("hidden_act", "gelu"), "engines compute silu alone", {"SGLang", "vLLM"}),
        ("eagle3", _set("hidden_act", "gelu"), "engines compute silu alone", {"SGLang", "vLLM"}),
        ("dflash", _set("tie_word_embeddings", True), "nothing to tie", set()),
        ("dflash", _set("rope_theta", 5.0), "rope_theta is 5.0 at the top level and 10000.0", {"SGLang", "vLLM"}),
        ("dflash", _drop("rope_theta", "rope_parameters"), "no rope_theta is written", {"SGLang", "vLLM"}),
        ("dflash", _drop("auto_map"), "the code that AutoModel needs", {"transformers"}),
        ("eagle3", _set("architectures", ["LlamaForCausalLM"]), "SGLang loads as a target", {"SGLang"}),
        ("eagle3", _set("norm_before_residual", True), "norm_before_residual is set", {"SGLang"}),
        ("eagle3", _drop("eagle_aux_hidden_state_layer_ids"), "are not written where vLLM reads", {"vLLM"}),
        ("eagle3", _drop("eagle_config"), "are not written where SGLang reads", {"SGLang"}),
        ("eagle3", _set("num_hidden_layers", 2), "'num_hidden_layers': 2", EVERYONE),
        ("eagle3", _set("tie_word_embeddings", True), "'tie_word_embeddings': True", EVERYONE),
    ],
)
def test_a_config_that_is_wrong(make, kind, change, words, breaks):
    told = inspect_drafter(make(kind, change))
    found = [fault for fault in told["faults"] if words in fault["fault"]]
    assert [set(fault["breaks"]) for fault in found] == [breaks], told["faults"]
    assert {loader for loader, loads in told["loads"].items() if not loads} >= breaks
    assert not breaks & told["launch"].keys()


def test_without_a_draft_vocabulary_size(make):
    told = inspect_drafter(make("eagle3", _drop("draft_vocab_size"), draft_token_ids=None))
    assert [fault["breaks"] for fault in told["faults"]] == [["SGLang"]]


def test_published_taps_need_not_be_written(make):
    """For 36 layers both engines' own default is the published one."""

    def change(config):
        config["eagle_aux_hidden_state_layer_ids"] = [2, 18, 33]
        del config["eagle_config"]

    assert inspect_drafter(make("eagle3", change))["faults"] == []


def test_biases_and_embeddings_that_sglang_leaves_out(make):
    told = inspect_drafter(make("eagle3", attention_bias=True, own_embeddings=True))
    assert [(fault["fault"].split(" is")[0], fault["breaks"]) for fault in told["faults"]] == [
        ("attention_bias", ["SGLang"]),
        ("there are embeddings, in place of which SGLang takes the target's", []),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("norm.weight"), r"Missing: ['norm.weight']"),
        (
            lambda tensors: tensors.update({"model.fc.weight": tensors.pop("fc.weight")}),
            "Unexpected: ['model.fc.weight']",
        ),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(7)}), "norm.weight is [7], not [32]"),
        (lambda tensors: tensors["norm.weight"].fill_(torch.nan), "not finite in ['norm.weight']"),
    ],
)
def test_tensors_that_are_wrong(kind, make, change, words):
    folder = make(kind)
    _tensors(folder, change)
    told = inspect_drafter(folder)
    (fault,) = told["faults"]
    assert words in fault["fault"] and set(fault["breaks"]) == EVERYONE
    assert not any(told["loads"].values()) and told["launch"] == {}


def test_tables_of_a_whole_vocabulary(make):
    folder = make("eagle3", draft_token_ids=None)
    _tensors(folder, lambda tensors: tensors.update(d2t=torch.zeros(48, dtype=torch.long)))
    (fault,) = inspect_drafter(folder)["faults"]
    assert "which vLLM refuses" in fault["fault"] and fault["breaks"] == ["vLLM"]


def test_several_dtypes(kind, make):
    folder = make(kind)
    _tensors(folder, lambda tensors: tensors.update({"norm.weight": tensors["norm.weight"].bfloat16()}))
    told = inspect_drafter(folder)
    (fault,) = told["faults"]
    assert "several dtypes" in fault["fault"] and fault["breaks"] == []
    assert told["dtypes"]["bfloat16"] == 1


def test_what_only_the_target_tells(kind, make, target_folder):
    folder = make(kind, _set("max_position_embeddings", 100))
    assert inspect_drafter(folder)["faults"] == []
    (fault,) = inspect_drafter(folder, target_folder)["faults"]
    assert "100 is less than the target's 256" in fault["fault"] and fault["breaks"] == ["SGLang"]


def test_a_folder_of_something_else(target_folder):
    with pytest.raises(ValueError, match="none of which is a drafter known here"):
        inspect_drafter(target_folder)


# -- engines and targets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "refusing"),
    [("qwen3", {}), ("llama", {}), ("gemma3", {"dflash": {"SGLang", "vLLM"}, "eagle3": {"vLLM"}})],
)
def test_engines_that_refuse_the_target_are_not_promised(kind, family, refusing, tmp_path):
    target = Target(tiny_model(family))
    target.model.save_pretrained(tmp_path / "target")
    tiny_drafter(kind, target).save_pretrained(tmp_path / "drafter")
    told = inspect_drafter(str(tmp_path / "drafter"), str(tmp_path / "target"))
    refuse = refusing.get(kind, set())
    assert {loader for loader, loads in told["loads"].items() if not loads} == refuse
    assert told["launch"].keys() == {"SGLang", "vLLM"} - refuse
    assert {engine for fault in told["faults"] for engine in fault["breaks"]} == refuse
    for engine in refuse:
        assert any(f"{engine} {ENGINES[engine]} hands no hidden" in fault["fault"] for fault in told["faults"])


def test_of_other_targets_it_is_said_that_nothing_is_known(kind, make, target_folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    config = json.loads((Path(target_folder) / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "olmo2"}))
    told = inspect_drafter(make(kind), str(other))
    assert told["loads"] == {"draft_opd_trl": True, "SGLang": None, "vLLM": None, "transformers": True}
    assert [fault["breaks"] for fault in told["faults"]] == [[], []]
    assert all("is not known here" in fault["fault"] for fault in told["faults"])
    assert "SGLang: not known" in inspect_command.show(told)


# -- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(kind, make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    add_adapter(load_drafter(make(kind)), config).save_pretrained(folder)
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


def test_code_that_is_not_whole(kind, make):
    folder = make(kind)
    (Path(folder) / "errors.py").unlink()
    (fault,) = inspect_drafter(folder)["faults"]
    assert "the code that AutoModel needs" in fault["fault"] and fault["breaks"] == ["transformers"]


def test_a_stray_file_of_weights(kind, make):
    folder = make(kind)
    tensors = load_file(f"{folder}/model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, f"{folder}/stray.safetensors")
    (fault,) = inspect_drafter(folder)["faults"]
    assert "['stray.safetensors'] are not its weights" in fault["fault"] and fault["breaks"] == ["SGLang", "vLLM"]


# -- commands ------------------------------------------------------------------------------------------------------


def test_the_commands_call_what_they_are_named_after(kind, make, target_folder, tmp_path_factory):
    folder, out = make(kind), str(tmp_path_factory.mktemp("out") / "spec")
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
