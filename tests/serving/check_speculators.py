"""Our `speculators` folders in that library itself, on a CPU; `make test-serving` runs this, `make test` does not.

It is where the layout comes from, and trains from a folder on; engines only read it.
"""

import shutil

import pytest
import torch
from check_engines import IN_SPECULATORS, MADE, NAME, POCKET, TOLERANCE, edit, make_folders, ours, relative_error
from environments import run_driver

from draft_opd_trl.folders.checkpoints import export_drafter


pytestmark = pytest.mark.timeout(3600)  # Building the environment downloads torch.


def _other_rope(config):
    config["transformer_layer_config"]["rope_parameters"]["rope_theta"] = 5e5
    config["transformer_layer_config"].pop("rope_theta", None)


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """Our jobs, and what the library made of them."""
    root = tmp_path_factory.mktemp("speculators")
    folders, jobs = make_folders(root, MADE), {}
    for name in IN_SPECULATORS:
        folder = root / f"{name}-speculators"
        export_drafter(str(folders[name]), str(folder), "speculators", target=str(POCKET / "target"), target_name=NAME)
        jobs[name] = {**ours(folders[name], "float32"), "folder": str(folder)}
        wrong = edit(shutil.copytree(folder, root / f"{name}-wrong"), _other_rope)
        jobs[f"{name}, other rope"] = {**jobs[name], "folder": str(wrong)}
    files = [root / name for name in ("jobs", "results")]
    told = ("logits", "confidence")
    torch.save({name: {k: v for k, v in job.items() if k not in told} for name, job in jobs.items()}, files[0])
    run_driver("speculators", "speculators_driver.py", *files)
    return jobs, torch.load(files[1])


@pytest.mark.parametrize("name", IN_SPECULATORS)
def test_the_library_drafts_what_we_draft(drafted, name):
    jobs, results = drafted
    job, result = jobs[name], results[name]
    error = relative_error(job, result)
    print(f"speculators: {name}: relative error {error:.2g}")
    assert error <= TOLERANCE["float32"]
    assert result["unset"] == []
    assert torch.equal(result["logits"].argmax(-1), job["draft_tokens"])
    if job["confidence"] is not None:
        assert torch.allclose(result["confidence"], job["confidence"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", IN_SPECULATORS)
def test_a_wrong_folder_is_seen(drafted, name):
    jobs, results = drafted
    wrong = f"{name}, other rope"
    assert relative_error(jobs[wrong], results[wrong]) > 100 * TOLERANCE["float32"]
