"""Our folders in SpecForge itself, on a CPU; `make test-serving` runs this, `make test` does not.

Its loader says which tensors it misses; the flat folders of EAGLE-3 are in its layout.
"""

import shutil
from pathlib import Path

import pytest
import torch
from check_engines import (
    CHANGES,
    FAULTS,
    MADE,
    ODD,
    TOLERANCE,
    add_tables,
    edit,
    make_folders,
    ours,
    relative_error,
)
from environments import run_driver
from safetensors.torch import load_file, save_file


pytestmark = pytest.mark.timeout(3600)  # Building the environment downloads torch.
FC = {"eagle3-fc": ("eagle3", {"fc_norm": True, "draft_token_ids": list(range(0, 1024, 2))})}
SAVED = ["drafter-dflash", "drafter-dflash-narrow", "dflash-layers", "dflash-gelu", "eagle3-part", "eagle3-fc"]
WHOLE = ["drafter-eagle3", "eagle3-whole", "eagle3-gelu"]
DSPARK = [
    *("drafter-dspark", "drafter-dspark-from-nothing", "dspark-made", "dspark-unsure", "dspark-alone"),
    *("dspark-gated", "dspark-rnn"),
]
# What is loaded there without a word, and drafts otherwise.
DIFFERENT = ["eagle3-residual", "eagle3-biased", "eagle3-norms", "norm_output: false"]


def _as_specforge(folder: Path) -> Path:
    """A DSpark folder whose fields stand where SpecForge writes them."""
    return edit(edit(folder, CHANGES["SpecForge's heads"][1]), CHANGES["SpecForge's architecture"][1])


def _without_norm(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _jobs(root: Path) -> dict[str, dict]:
    folders = make_folders(root, {**MADE, **ODD, **FC})

    def copy(name: str, suffix: str) -> Path:
        return shutil.copytree(folders[name], root / f"{name}-{suffix}")

    placed = {name: folders[name] for name in SAVED}
    placed |= {name: _as_specforge(copy(name, "specforge")) for name in DSPARK}
    placed |= {name: add_tables(copy(name, "tables")) for name in [*WHOLE, *DIFFERENT[:3]]}
    placed["norm_output: false"] = edit(
        copy("eagle3-part", "unnormed"), lambda config: config.update(norm_output=False)
    )
    jobs = {name: {**ours(folder, "float32"), "folder": str(folder)} for name, folder in placed.items()}
    for name in [*SAVED, *WHOLE, *DSPARK]:
        right = jobs[name]
        partial = _without_norm(shutil.copytree(right["folder"], root / f"{name}-partial"))
        for fault, change in FAULTS.items():
            wrong = edit(shutil.copytree(right["folder"], root / f"{name}-{fault}"), change)
            jobs[f"{name}, {fault}"] = {**right, "folder": str(wrong)}
        jobs[f"{name}, missing tensor"] = {**right, "folder": str(partial)}
    for name in [*WHOLE, *DSPARK]:
        jobs[f"{name}, as saved"] = {**jobs[name], "folder": str(folders[name])}
    return jobs


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """Our jobs, and what the library made of them."""
    root = tmp_path_factory.mktemp("specforge")
    jobs, files = _jobs(root), [root / name for name in ("jobs", "results")]
    told = ("logits", "confidence")
    torch.save({name: {k: v for k, v in job.items() if k not in told} for name, job in jobs.items()}, files[0])
    # Its norms would be compiled.
    run_driver("specforge", "specforge_driver.py", *files, TORCHDYNAMO_DISABLE="1")
    return jobs, torch.load(files[1])


@pytest.mark.parametrize("name", [*SAVED, *WHOLE, *DSPARK])
def test_the_library_drafts_what_we_draft(drafted, name):
    jobs, results = drafted
    job, result = jobs[name], results[name]
    error = relative_error(job, result)
    print(f"SpecForge: {name}: relative error {error:.2g}")
    assert error <= TOLERANCE["float32"]
    assert result["unset"] == []
    assert torch.equal(result["logits"].argmax(-1), job["draft_tokens"])
    if job["confidence"] is not None:
        assert torch.allclose(result["confidence"], job["confidence"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [*SAVED, *WHOLE, *DSPARK])
def test_a_wrong_folder_is_seen(drafted, name, fault):
    jobs, results = drafted
    wrong = f"{name}, {fault}"
    assert relative_error(jobs[wrong], results[wrong]) > 100 * TOLERANCE["float32"]


@pytest.mark.parametrize("name", [*SAVED, *WHOLE, *DSPARK])
def test_a_missing_tensor_is_an_error_there_too(drafted, name):
    assert (
        "missing draft weights required by this architecture: ['norm.weight']"
        in (drafted[1][f"{name}, missing tensor"]["error"])
    )


@pytest.mark.parametrize("name", [*WHOLE, *DSPARK])
def test_what_it_refuses_as_we_write_it(drafted, name):
    """The traps of docs/source/serving.md: no tables of a whole vocabulary, and DSpark as DeepSpec spells it."""
    reason = "architecture: ['d2t', 't2d']" if name in WHOLE else "'Qwen3DSparkModel' is not registered"
    assert reason in drafted[1][f"{name}, as saved"]["error"]


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_it_computes_otherwise(drafted, name):
    jobs, results = drafted
    error = relative_error(jobs[name], results[name])
    print(f"SpecForge: {name}: relative error {error:.2g}")
    assert error > 100 * TOLERANCE["float32"]
