"""The Python of an engine: an environment of its own, built where it is first asked for."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "draft_opd_trl" / "serving"
TORCH = "torch==2.13.0"


def python_of(engine: str) -> Path:
    """
    The Python with what `requirements-<engine>.txt` pins.

    Where it cannot be built, the test that asks is skipped with the reason.
    """
    requirements = HERE / f"requirements-{engine}.txt"
    digest = hashlib.sha256(requirements.read_bytes() + TORCH.encode()).hexdigest()[:12]
    home = CACHE / f"{engine}-{digest}"
    if not (home / "installed").is_file():
        shutil.rmtree(home, ignore_errors=True)
        pip = [home / "bin" / "python", "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        # The engine without its dependencies, most of which are kernels for a GPU.
        for command in ([sys.executable, "-m", "venv", home], [*pip, TORCH], [*pip, "--no-deps", "-r", requirements]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{engine} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        (home / "installed").touch()
    return home / "bin" / "python"


def run_driver(engine: str, driver: str, *files: Path, **environment: str) -> None:
    """Run a driver of this folder on files, in the folder of the first, by the engine's Python."""
    inherited = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    inherited["HF_MODULES_CACHE"] = str(files[0].parent / "modules")
    command = [python_of(engine), HERE / driver, *files]
    done = subprocess.run(
        command, env={**inherited, **environment}, cwd=files[0].parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
