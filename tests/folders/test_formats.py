"""Layouts of drafter folders: conversion in both directions, and code that travels with the weights."""

import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from alone import ALONE_IN, assert_drafts_alone
from conftest import (
    IN_SPECULATORS,
    KINDS,
    POCKET,
    SHIPPED,
    TRAVELLING,
    pocket_target_and_prompts,
    tiny_drafter,
    tiny_model,
)
from invariants import assert_same_blocks, assert_same_drafter
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_relative_import_files

from draft_opd_trl.core.travel import travelling_code
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import inspect_drafter


@pytest.fixture(params=SHIPPED, ids=attrgetter("name"))
def shipped(request):
    return request.param


@pytest.fixture
def folder(qwen_drafter, tmp_path):
    qwen_drafter.save_pretrained(tmp_path / "flat")
    return tmp_path / "flat"


def _edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != ...}))


def test_the_shipped_folders_load_everywhere(shipped):
    told = inspect_drafter(str(shipped), str(POCKET / "target"))
    assert told["faults"] == [] and all(told["loads"].values())


def test_what_is_shipped_drafts_the_same_after_saving(shipped, tmp_path):
    """Trained drafters, held-out prompts; `examples/benchmarks/serving.py` measures the same on more of them."""
    target, prompts = pocket_target_and_prompts(3)
    settings = SpeculationSettings(40, [])
    drafter = load_drafter(str(shipped)).bind(target)
    drafter.save_pretrained(tmp_path)
    loaded = load_drafter(str(tmp_path)).bind(target)
    first, second = (speculate(target, one, prompts, settings) for one in (drafter, loaded))
    assert_same_blocks(first.blocks, second.blocks)
    assert float(first.blocks.num_accepted.float().mean()) > 2
    assert first.completions() == second.completions() == speculate(target, None, prompts, settings).completions()


# -- conversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", IN_SPECULATORS, indirect=True)
def test_both_layouts_hold_the_same_drafter(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    """Flat → speculators → flat; each step is read back, and drafts the same blocks."""
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    assert_same_drafter(qwen_target, qwen_drafter, load_drafter(str(tmp_path / "spec")))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), qwen_drafter.kind)
    assert_same_drafter(qwen_target, qwen_drafter, again)
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "again" / "model.safetensors").keys()
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first == last


@pytest.mark.parametrize("kind", IN_SPECULATORS, indirect=True)
def test_the_speculators_folder(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    target = str(target_folder)
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=target, target_name="org/target")
    config = json.loads((tmp_path / "spec" / "config.json").read_text())
    assert config["speculators_model_type"] == qwen_drafter.kind
    assert config["speculators_config"] == {
        "algorithm": qwen_drafter.kind,
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": "org/target", "architectures": ["Qwen3ForCausalLM"]},
    }
    layer = config["transformer_layer_config"]
    assert layer["rope_theta"] == layer["rope_parameters"]["rope_theta"] == 10000.0
    assert layer["tie_word_embeddings"] is False
    assert "_name_or_path" not in config and "_name_or_path" not in layer and str(folder) not in json.dumps(config)


@pytest.mark.parametrize("kind", IN_SPECULATORS, indirect=True)
def test_files_have_the_mode_that_this_process_gives_them(qwen_drafter, target_folder, folder, tmp_path):
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    (tmp_path / "plain").touch()
    files = [*folder.iterdir(), *(tmp_path / "spec").iterdir()]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}


def test_export_leaves_what_is_not_its_own(qwen_drafter, folder, tmp_path):
    """A folder beside the new one may be anybody's."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "precious").touch()
    export_drafter(str(folder), str(tmp_path / "out"), qwen_drafter.kind)
    assert (tmp_path / "out.part" / "precious").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"flat", "out", "out.part"}


# -- what export refuses and settles -------------------------------------------------------------------------------


def test_export_settles_what_the_config_leaves_open(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    _edit(folder, max_position_embeddings=64)
    assert load_drafter(str(folder)).config.max_position_embeddings == 64
    kind = qwen_drafter.kind
    written = export_drafter(str(folder), str(tmp_path / "out"), kind, target=str(target_folder), dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 256
    assert {parameter.dtype for parameter in written.parameters()} == {torch.bfloat16}
    # In a run the drafter is bound to its target, which settles the same.
    assert load_drafter(str(folder)).bind(qwen_target).config.max_position_embeddings == 256


def test_export_refuses(qwen_drafter, folder, tmp_path):
    other = next(kind for kind in KINDS if kind != qwen_drafter.kind)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=f"kind {qwen_drafter.kind}, which cannot be written as '{other}'"):
        export_drafter(str(folder), out, other)
    with pytest.raises(ValueError, match="names its target.*give `target`"):
        export_drafter(str(folder), out, "speculators")
    with pytest.raises(FileExistsError, match="not empty. Give a new folder"):
        export_drafter(str(folder), str(folder), qwen_drafter.kind)
    tiny_model("qwen3", vocab_size=50).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocab_size 48 is not the target's 50"):
        export_drafter(str(folder), out, qwen_drafter.kind, target=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


# -- the code that travels with a folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("shipped", [folder for folder in SHIPPED if any(folder.glob("*.py"))], ids=attrgetter("name"))
def test_the_shipped_folders_load_where_this_package_is_not(shipped, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE_IN, str(shipped), str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, stored = torch.load(tmp_path / "state"), load_file(shipped / "model.safetensors")
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)


def test_the_shipped_code_is_the_packages(shipped):
    """Otherwise renew it: `python examples/pocket/build.py code`."""
    drafter_class = type(load_drafter(str(shipped)))
    code = travelling_code(drafter_class.__module__) if drafter_class.code_travels else {}
    assert {path.name: path.read_text() for path in shipped.glob("*.py")} == code


@pytest.mark.parametrize("kind", TRAVELLING)
def test_a_folder_loads_where_this_package_is_not(qwen_target, target_folder, kind, tmp_path):
    assert_drafts_alone(tiny_drafter(kind, qwen_target), qwen_target, target_folder, tmp_path)


@pytest.mark.parametrize("kind", TRAVELLING)
def test_what_travels_is_what_drafting_needs(kind, qwen_target, tmp_path):
    """No target, no cache, no records, no sampling; and transformers finds every file."""
    drafter = tiny_drafter(kind, qwen_target)
    drafter.save_pretrained(tmp_path)
    main = tmp_path / f"{type(drafter).__module__.rpartition('.')[2]}.py"
    files = {path.name for path in tmp_path.glob("*.py")}
    assert files == {main.name, *(Path(file).name for file in get_relative_import_files(main))}
    assert not {"target.py", "cache.py", "records.py", "sampling.py"} & files


def test_from_pretrained_reads_what_save_pretrained_wrote(qwen_target, kind, tmp_path):
    drafter = tiny_drafter(kind, qwen_target)
    drafter.save_pretrained(tmp_path)
    plain = CONFIG_MAPPING[drafter.config.model_type].from_pretrained(tmp_path)
    for config in (None, plain):
        assert_same_drafter(qwen_target, drafter, type(drafter).from_pretrained(tmp_path, config=config).eval())
    loaded, told = type(drafter).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(drafter) and not any(told.values())


def test_from_pretrained_is_strict(qwen_drafter, folder):
    tensors = load_file(folder / "model.safetensors")
    name = min(tensors)
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(name)):
        type(qwen_drafter).from_pretrained(folder)


@pytest.mark.parametrize("kind", TRAVELLING, indirect=True)
def test_the_code_in_a_folder(qwen_drafter, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": f"{qwen_drafter.kind}.{type(qwen_drafter).__name__}"}
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert f"{qwen_drafter.kind}_config.py" in code
    assert not any("import draft_opd_trl" in source or "from .." in source for source in code.values())
