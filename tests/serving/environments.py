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
TORCH, UV = "torch==2.13.0", "uv==0.13.9"


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
        fault = _build(home, requirements)
        if fault:
            pytest.skip(f"{engine} cannot be installed here: {fault}")
        (home / "installed").touch()
    return home / "bin" / "python"


def _build(home: Path, requirements: Path) -> str | None:
    """
    Make an environment; the last line of what went wrong, if something did.

    uv unpacks a wheel once for all environments, and links its files into each. Where it fails, pip does it all.
    """
    python, wheels = home / "bin" / "python", CACHE / "wheels"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    uv = [home / "bin" / "uv", "pip", "install", "-q", "--python", python]
    # The engine without its dependencies, most of which are kernels for a GPU.
    engine = ["--no-deps", "-r", requirements]
    # pip chooses torch's build, of those it can see; what the engine pins comes last, as its pins count.
    fault = _fault([sys.executable, "-m", "venv", home]) or _fault(
        [*pip, "download", "--no-deps", "-d", wheels, TORCH]
    )
    if fault:
        return fault
    torch = max(wheels.glob(f"{TORCH.replace('==', '-')}*.whl"), key=lambda wheel: wheel.stat().st_mtime)
    if not (_fault([*pip, "install", UV]) or _fault([*uv, torch]) or _fault([*uv, *engine])):
        return None
    return _fault([*pip, "install", torch]) or _fault([*pip, "install", *engine])


def _fault(command: list) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


def run_driver(engine: str, driver: str, *files: Path, **environment: str) -> None:
    """Run a driver of this folder on files, in the folder of the first, by the engine's Python."""
    # What an engine imports is compiled once, whatever this process was told.
    inherited = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": ""}
    inherited["HF_MODULES_CACHE"] = str(files[0].parent / "modules")
    command = [python_of(engine), HERE / driver, *files]
    done = subprocess.run(
        command, env={**inherited, **environment}, cwd=files[0].parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-5000:]
