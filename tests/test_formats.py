"""Layouts of drafter folders: conversion in both directions, and code that travels with the weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IN_SPECULATORS, KINDS, POCKET, SHIPPED, pocket_target_and_prompts, tiny_drafter
from invariants import assert_same_blocks, assert_same_drafter
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.dynamic_module_utils import get_relative_import_files

from draft_opd_trl.checkpoints import export_drafter, load_drafter
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.inspection import inspect_drafter
from draft_opd_trl.sampling import Chooser
from draft_opd_trl.speculation import SpeculationSettings, speculate
from draft_opd_trl.travel import travelling_code


@pytest.fixture(params=SHIPPED, ids=lambda folder: folder.name)
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


@pytest.mark.parametrize("kind", IN_SPECULATORS, scope="session")
def test_both_layouts_hold_the_same_drafter(qwen_target, qwen_drafter, target_folder, folder, tmp_path):
    """Flat → speculators → flat; each step is read back, and drafts the same blocks."""
    export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=str(target_folder))
    assert_same_drafter(qwen_target, qwen_drafter, load_drafter(str(tmp_path / "spec")))
    again = export_drafter(str(tmp_path / "spec"), str(tmp_path / "again"), qwen_drafter.kind)
    assert_same_drafter(qwen_target, qwen_drafter, again)
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "again" / "model.safetensors").keys()
    first, last = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert first == last


@pytest.mark.parametrize("kind", IN_SPECULATORS, scope="session")
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


@pytest.mark.parametrize("kind", IN_SPECULATORS, scope="session")
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


def test_export_refuses(qwen_drafter, target_folder, folder, tmp_path):
    other = next(kind for kind in KINDS if kind != qwen_drafter.kind)
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=f"kind {qwen_drafter.kind}, which cannot be written as '{other}'"):
        export_drafter(str(folder), out, other)
    with pytest.raises(ValueError, match="names its target.*give `target`"):
        export_drafter(str(folder), out, "speculators")
    with pytest.raises(FileExistsError, match="not empty. Give a new folder"):
        export_drafter(str(folder), str(folder), qwen_drafter.kind)
    _edit(folder, vocab_size=50)
    tensors = load_file(folder / "model.safetensors")
    if "t2d" in tensors:
        save_file({**tensors, "t2d": torch.nn.functional.pad(tensors["t2d"], (0, 2))}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="vocab_size 50 is not the target's 48"):
        export_drafter(str(folder), out, qwen_drafter.kind, target=str(target_folder))
    assert not (tmp_path / "out").exists()


# -- the code that travels with a folder ---------------------------------------------------------------------------

# Kinds whose folder holds code; that of others is a plain model of transformers.
TRAVELLING = [kind for kind in KINDS if DRAFTERS[kind].code_travels]
ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("draft_opd_trl", "trl"):
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocker())

from types import SimpleNamespace

import torch
from transformers import AutoModel, AutoModelForCausalLM

target_folder, folder, again, job = sys.argv[1:]
drafter = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
model = AutoModelForCausalLM.from_pretrained(target_folder)
config, embedding = model.config, model.get_input_embeddings()
sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "num_layers": config.num_hidden_layers}
lent = {"embedding": embedding, "embed": embedding, "head": model.get_output_embeddings()}
drafter.bind(SimpleNamespace(name="the target", config=config, **sizes, **lent))

prompt = torch.load(job)
states = model(prompt, output_hidden_states=True).hidden_states
features = torch.cat([states[index + 1] for index in drafter.target_layer_ids], dim=-1)
state = drafter.start(1, 64)
positions = torch.arange(prompt.shape[1])[None]
drafter.extend(state, features, positions, prompt)
anchor = torch.tensor([[prompt.shape[1] - 1]])
proposal = drafter.propose(state, prompt[:, -1:], anchor, prompt.shape[1], lambda logits: (logits.argmax(-1), None))
drafter.save_pretrained(again)
assert not any(name.startswith("draft_opd_trl") for name in sys.modules)
torch.save({"state": drafter.state_dict(), "tokens": proposal.tokens}, job)
"""


ALONE_IN = (
    ALONE[: ALONE.index("target_folder, folder")]
    + """
drafter, told = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(told.values())
torch.save(drafter.state_dict(), sys.argv[2])
"""
)


def test_the_shipped_folders_load_where_this_package_is_not(shipped, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ALONE_IN, str(shipped), str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, stored = torch.load(tmp_path / "state"), load_file(shipped / "model.safetensors")
    assert state.keys() == stored.keys() and all(torch.equal(state[name], stored[name]) for name in stored)


def test_the_shipped_code_is_the_packages(shipped):
    """Otherwise renew it: `python examples/pocket/build.py code`."""
    code = travelling_code(type(load_drafter(str(shipped))).__module__)
    assert {path.name: path.read_text() for path in shipped.glob("*.py")} == code


@torch.no_grad()
def assert_drafts_alone(drafter, target, target_folder, tmp_path):
    """Saved, a drafter proposes the same in a process without this package, and saves itself there as it was."""
    drafter.save_pretrained(tmp_path / "drafter")
    prompt = torch.arange(3, 12)[None]
    torch.save(prompt, tmp_path / "job")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    arguments = [str(path) for path in (target_folder, tmp_path / "drafter", tmp_path / "again", tmp_path / "job")]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "job")
    assert there["state"].keys() == drafter.state_dict().keys()
    assert all(torch.equal(value, there["state"][name]) for name, value in drafter.state_dict().items())
    # The same by hand in this process; the anchor is the prompt's last token.
    features, _ = target.forward_text(prompt, drafter.target_layer_ids)
    state, length = drafter.start(1, 64), prompt.shape[1]
    drafter.extend(state, features, torch.arange(length)[None], prompt)
    here = drafter.propose(state, prompt[:, -1:], torch.tensor([[length - 1]]), length, Chooser())
    assert torch.equal(there["tokens"], here.tokens)
    # Saved again from there, the folder is the same, code included.
    names = {path.name for path in (tmp_path / "drafter").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "drafter" / name).read_bytes()
    assert_same_drafter(target, drafter, load_drafter(str(tmp_path / "again")))


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


def test_the_code_in_a_folder(qwen_drafter, folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": f"{qwen_drafter.kind}.{type(qwen_drafter).__name__}"}
    code = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert f"{qwen_drafter.kind}_config.py" in code
    assert not any("import draft_opd_trl" in source or "from .." in source for source in code.values())
