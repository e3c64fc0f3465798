"""Broken, damaged and hostile drafter folders: a clear error or the very same drafter, soon, and in little memory."""

import resource
import shutil
import signal
from contextlib import contextmanager
from random import Random

import pytest
import torch
from conftest import IN_SPECULATORS, KINDS, random_prompts, tiny_drafter
from hostile_folders import broken_folders
from peft import LoraConfig

from draft_opd_trl.core.errors import UserError
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.folders.checkpoints import export_drafter, load_drafter
from draft_opd_trl.folders.inspection import inspect_drafter
from draft_opd_trl.training.loading import add_adapter


SECONDS = 20  # Nothing takes one; the machine may be busy.
MEGABYTES = 700


@contextmanager
def _soon():
    def stop(*_):
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


LAYOUTS = [(kind, layout) for kind in KINDS for layout in ("flat", "adapter")]
LAYOUTS += [(kind, "speculators") for kind in IN_SPECULATORS]


@pytest.fixture(scope="module")
def whole_folders(qwen_target, kind, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"whole-{kind}")
    qwen_target.model.save_pretrained(root / "target")
    tiny_drafter(kind, qwen_target).save_pretrained(root / "flat")
    if kind in IN_SPECULATORS:
        export_drafter(str(root / "flat"), str(root / "speculators"), "speculators", target=str(root / "target"))
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    add_adapter(load_drafter(str(root / "flat")), config).save_pretrained(root / "adapter")
    return root


@pytest.mark.parametrize(("kind", "layout"), LAYOUTS, scope="session")
def test_every_broken_folder_is_refused_or_read_as_the_whole_one(qwen_target, whole_folders, kind, layout, tmp_path):
    def proposals(path):
        drafter = load_drafter(str(path)).bind(qwen_target)
        settings = SpeculationSettings(8, [], batch_size=4)
        return speculate(qwen_target, drafter, random_prompts(4, seed=3), settings).blocks.draft_tokens

    expected = proposals(whole_folders / layout)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, outcomes = {}, {"refused": 0, "same": 0}
    for name, folder in broken_folders(whole_folders / layout, tmp_path, Random(0)):
        out = tmp_path / "out"
        actions = {
            "load": lambda folder=folder: torch.equal(proposals(folder), expected),
            "inspect": lambda folder=folder: isinstance(inspect_drafter(str(folder)), dict),
            "export": lambda folder=folder, out=out: bool(export_drafter(str(folder), str(out), kind)),
        }
        for does, action in actions.items():
            try:
                with _soon():
                    if not action():
                        wrong[f"{does}, {name}"] = "another drafter, silently"
                    outcomes["same"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                if "\n" in str(error) or not str(error).endswith((".", "?")):
                    wrong[f"{does}, {name}"] = f"no clear line: {error}"
            except Exception as error:
                wrong[f"{does}, {name}"] = f"{type(error).__name__}: {error}"[:200]
        assert not (folder / "code-ran").exists(), name
        shutil.rmtree(out, ignore_errors=True)
    assert not wrong, "\n".join(f"{name}: {told}" for name, told in wrong.items())
    assert outcomes["refused"] > 100 and outcomes["same"] > 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES * 1024
