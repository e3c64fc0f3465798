"""The package as pip installs it: built from its own sdist, whole, and at work where the source tree is not."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import HELD_OUT, POCKET, ROOT, SHIPPED, SHIPPED_PAIR


BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def _run(command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Made from the sdist, as pip does where there is no wheel, so that what the sdist lacks shows."""
    place = tmp_path_factory.mktemp("dist")
    # Builders leave folders behind, so not in the tree itself; and without what a checkout holds beside the package.
    shutil.copytree(
        ROOT / "draft_opd_trl", place / "tree" / "draft_opd_trl", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "tree")
    name = _run([sys.executable, "-c", BUILD, "build_sdist", place], place / "tree").split()[-1]
    with tarfile.open(place / name) as sdist:
        sdist.extractall(place, filter="data")
    unpacked = place / name.removesuffix(".tar.gz")
    return place / _run([sys.executable, "-c", BUILD, "build_wheel", place], unpacked).split()[-1]


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    package = ROOT / "draft_opd_trl"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}


def test_installed_wheel_inspects_and_evaluates(wheel, tmp_path):
    _run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = ["--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index", wheel]
    _run([sys.executable, "-m", "pip", "--python", python, *install], tmp_path)
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    # What it depends on is taken from here. The editable install is not: Python follows no .pth file from a .pth file.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    draft_opd = tmp_path / "venv" / "bin" / "draft-opd"

    origin = _run([python, "-c", "import draft_opd_trl; print(draft_opd_trl.__file__)"], tmp_path)
    assert Path(origin.strip()).is_relative_to(site)
    looked_at = json.loads(_run([draft_opd, "inspect", SHIPPED[0], "--target", POCKET / "target", "--json"], tmp_path))
    assert looked_at["loads"]["draft_opd_trl"]
    words = [*SHIPPED_PAIR, "--suite", HELD_OUT, "--num_prompts", "2", "--max_new_tokens", "24", "--json"]
    (measured,) = json.loads(_run([draft_opd, "evaluate", *words], tmp_path))["results"]
    (drafter,) = measured["drafters"].values()
    assert drafter["acceptance_length"] > 1
    assert drafter["texts"] == {"checked": 2, "changed": 0, "at_ties": 0, "largest_gap": 0.0}
