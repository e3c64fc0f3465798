"""The drafter that docs/source/own_drafter.md builds, run as the page has it."""

import importlib.util
import re
import sys

import pytest
import torch
from conftest import ROOT, random_prompts, tiny_model
from invariants import (
    assert_draft_is_propose,
    assert_every_parameter_gets_a_gradient,
    assert_lossless,
    assert_replay_is_speculation,
    assert_saves_and_loads,
)
from runs import make_trainer, spelled_prompts, written_texts

from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings
from draft_opd_trl.drafters import DRAFTERS, create_drafter
from draft_opd_trl.folders.checkpoints import load_drafter
from draft_opd_trl.folders.inspection import inspect_drafter


NAME = "draft_opd_trl.drafters.heads"


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """The page's file in the place that the page gives it, and its line in the registry."""
    page = (ROOT / "docs" / "source" / "own_drafter.md").read_text(encoding="utf-8")
    file = tmp_path_factory.mktemp("drafters") / "heads.py"
    file.write_text("\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(NAME, file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, NAME, module)
        spec.loader.exec_module(module)
        patch.setitem(DRAFTERS, "heads", module.HeadsDraftModel)
        yield


@pytest.fixture
def target():
    return Target(tiny_model("qwen3"))


@pytest.fixture
def drafter(heads, target):
    torch.manual_seed(1)
    return create_drafter("heads", target, num_draft_tokens=3).eval()


def test_it_keeps_what_every_drafter_must(target, drafter):
    assert_draft_is_propose(target, drafter)
    assert_every_parameter_gets_a_gradient(target, drafter)
    rollout = assert_lossless(target, drafter, random_prompts(4), SpeculationSettings(20, [3, 4], batch_size=2))
    assert_replay_is_speculation(target, drafter, rollout)


def test_it_is_saved_and_loaded(target, drafter, tmp_path):
    assert_saves_and_loads(target, drafter, tmp_path / "folder")
    said = inspect_drafter(str(tmp_path / "folder"))
    assert said["kind"] == "heads"


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_it_is_trained_by_sft_and_draft_opd(target, drafter, lmbda, tmp_path):
    before = drafter.heads[0].weight.detach().clone()
    texts = written_texts(target.model, spelled_prompts(8))
    trainer = make_trainer(drafter, target.model, texts, tmp_path, lmbda=lmbda, rejected_weight=lmbda)
    trainer.train()
    trainer.save_model()
    assert not torch.equal(load_drafter(str(tmp_path)).heads[0].weight, before)
