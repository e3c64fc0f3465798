"""The folders of two kinds that do not ship: written, read, exported, inspected, carded, pushed, and what travels."""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from alone import assert_drafts_alone
from conftest import random_prompts, tiny_drafter
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_toy_kind import ADAPTED, TOYS, MarkovConfig, MarkovDrafter, SmallLMDrafter
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Model

from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.drafters import DRAFTERS
from draft_opd_trl.drafters.base import Drafter
from draft_opd_trl.folders import hub
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.folders.model_card import write_model_card
from draft_opd_trl.folders.target_folder import read_target_config
from draft_opd_trl.training.loading import add_adapter


class WrappedLMDrafter(SmallLMDrafter):
    """The same language model in a shell, so that its tensors have other names here than in its folder."""

    kind = "wrapped_lm"

    def __init__(self, config):
        Drafter.__init__(self, config)
        self.shell = nn.ModuleDict(
            {"model": Qwen3Model(config), "lm_head": nn.Linear(config.hidden_size, config.vocab_size, bias=False)}
        )
        self.post_init()

    model = property(lambda self: self.shell["model"])
    lm_head = property(lambda self: self.shell["lm_head"])

    @classmethod
    def canonical_tensors(cls, tensors, config):
        return {f"shell.{name}": tensor for name, tensor in tensors.items()}

    def folder_tensors(self, tensors):
        return {name.removeprefix("shell."): tensor for name, tensor in tensors.items()}


FOLDERS = {**TOYS, WrappedLMDrafter.kind: WrappedLMDrafter}


@pytest.fixture(params=FOLDERS)
def stored(request, qwen_target, tmp_path, monkeypatch):
    """A drafter of each kind and its folder, while the kind is registered alone beside those that ship."""
    monkeypatch.setitem(DRAFTERS, request.param, FOLDERS[request.param])
    drafter, folder = tiny_drafter(request.param, qwen_target), tmp_path / "drafter"
    drafter.save_pretrained(folder)
    return drafter, folder


def proposals(target, drafter):
    return speculate(target, drafter.bind(target), random_prompts(4), SpeculationSettings(12, [])).blocks.draft_tokens


def test_its_folder_is_read_whole_or_not_at_all(qwen_target, stored, tmp_path):
    drafter, folder = stored
    loaded = load_drafter(str(folder))
    assert type(loaded) is type(drafter)
    assert torch.equal(proposals(qwen_target, loaded), proposals(qwen_target, drafter))
    loaded.save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    tensors = load_file(folder / "model.safetensors")
    # As the Trainer reads a checkpoint that it goes on from.
    blank = type(drafter)(drafter.config)
    assert blank.load_state_dict(tensors, strict=False).missing_keys == []
    assert all(torch.equal(value, drafter.state_dict()[name]) for name, value in blank.state_dict().items())
    name = next(name for name in tensors if name.endswith("norm.weight"))
    for broken, words in (
        ({other: tensor for other, tensor in tensors.items() if other != name}, "Missing: .*norm.weight"),
        ({**tensors, "stray": torch.ones(1)}, "Unexpected: .*stray"),
        ({**tensors, name: torch.full_like(tensors[name], torch.nan)}, "not finite in .*norm.weight"),
    ):
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            load_drafter(str(folder))


def test_its_folder_is_exported_inspected_and_carded(qwen_target, stored, tmp_path):
    drafter, folder = stored
    written = export_drafter(str(folder), str(tmp_path / "out"), drafter.kind)
    assert torch.equal(proposals(qwen_target, written), proposals(qwen_target, drafter))
    qwen_target.model.save_pretrained(tmp_path / "target")
    target = str(tmp_path / "target")
    with pytest.raises(ValueError, match="has no speculators layout"):
        export_drafter(str(folder), str(tmp_path / "spec"), "speculators", target=target)
    assert not (tmp_path / "spec").exists()
    plain = not drafter.code_travels
    for name in (None, target):
        told = inspect_drafter(str(tmp_path / "out"), name)
        assert told["kind"] == drafter.kind and told["config"]["num_draft_tokens"] == 4
        assert told["layout"] == ("a plain model of transformers" if plain else "flat")
        # The code of a class that stands in a test goes nowhere.
        assert told["loads"] == {
            "draft_opd_trl": True,
            "SGLang": None,
            "vLLM": True if plain else None,
            "transformers": plain,
        }
        assert ("draft_model" in told["launch"]["vLLM"]) == plain and "MARKOV" not in told["launch"]["vLLM"]
        assert ("STANDALONE" if plain else "MARKOV") in told["launch"]["SGLang"]
    write_model_card(tmp_path / "README.md", "user/mine", drafter, target)
    card = (tmp_path / "README.md").read_text()
    assert f"**{drafter.kind}**" in card and told["launch"]["vLLM"].split()[0] in card
    assert ("AutoModelForCausalLM.from_pretrained" in card) == plain == ("trust_remote_code" not in card)
    assert ("On its own it is no language" in card) != plain
    assert ("| target layers it reads | none |" in card) == plain


def test_an_adapter_on_it_is_merged_on_export(qwen_target, stored, tmp_path):
    drafter, folder = stored
    targets = ADAPTED.get(drafter.kind, ADAPTED["small_lm"])
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = add_adapter(load_drafter(str(folder)), config)
    model.save_pretrained(tmp_path / "adapter")
    assert inspect_drafter(str(tmp_path / "adapter"))["layout"] == "adapter (LORA)"
    written = export_drafter(str(tmp_path / "adapter"), str(tmp_path / "whole"), drafter.kind)
    expected = hub.merged(model).state_dict()
    assert written.state_dict().keys() == expected.keys()
    changed = 0
    for name, value in written.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        changed += not torch.equal(value, drafter.state_dict()[name])
    assert changed >= len(targets)


def test_its_folder_is_pushed_with_a_card(stored, monkeypatch):
    drafter, folder = stored
    sent = {}

    def upload(folder_path, **_):
        sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})

    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(hub, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(hub, "upload_folder", upload)
    hub.push_drafter(drafter, "user/mine")
    assert f"**{drafter.kind}**".encode() in sent.pop("README.md")
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_plain_model_is_one_to_transformers(qwen_target, stored, prompts):
    drafter, folder = stored
    if drafter.code_travels:
        pytest.skip("its code travels")
    assert not list(folder.glob("*.py")) and "auto_map" not in (folder / "config.json").read_text()
    model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3ForCausalLM" and not any(told.values())
    text = torch.tensor([prompts[0]])
    states = drafter.model(text).last_hidden_state
    torch.testing.assert_close(model(text).logits, drafter.logits(states))
    # What is a plain model can be a target too.
    assert read_target_config(str(folder)).vocab_size == qwen_target.vocab_size


def test_code_of_a_kind_in_the_package_travels(qwen_target, tmp_path, monkeypatch):
    """The toy's own source, as the file that it would be."""
    package, name = Drafter.__module__.rpartition(".")[0], f"{Drafter.__module__.rpartition('.')[0]}.markov"
    head = """from __future__ import annotations
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config
from .block_backbone import BlockDrafter
from .drafter_config import DrafterConfig
from .parts import shape_of
"""
    path = tmp_path / "markov.py"
    path.write_text("\n\n".join([head, *(inspect.getsource(one) for one in (MarkovConfig, MarkovDrafter))]))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.__package__ == package
    monkeypatch.setitem(DRAFTERS, "markov", module.MarkovDrafter)
    qwen_target.model.save_pretrained(tmp_path / "target")
    assert_drafts_alone(tiny_drafter("markov", qwen_target), qwen_target, tmp_path / "target", tmp_path)
    assert inspect_drafter(str(tmp_path / "drafter"))["faults"] == []
