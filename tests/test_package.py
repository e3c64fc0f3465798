"""The package as users install it: quick to import, typed, one version."""

import configparser
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import draft_opd_trl


PACKAGE = Path(draft_opd_trl.__file__).parent
IMPORT_SECONDS = 3.0


def _run_fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_import_takes_less_than_three_seconds():
    # The best of three: the first run reads the disk, and any run may share its core with other tests.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        _run_fresh("import draft_opd_trl")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < IMPORT_SECONDS, f"import draft_opd_trl took {seconds} s: import heavy modules on first use"


def test_import_loads_no_models():
    # These are what takes the seconds: TRL's trainers alone cost about six.
    heavy = ("transformers.modeling_utils", "transformers.models.", "trl.trainer", "datasets", "accelerate")
    loaded = _run_fresh("import sys, draft_opd_trl; print('\\n'.join(sys.modules))").split()
    assert "draft_opd_trl" in loaded
    assert [name for name in loaded if name.startswith(heavy)] == []


def test_public_names_exist():
    assert draft_opd_trl.__all__, "the package exports nothing"
    missing = [name for name in draft_opd_trl.__all__ if getattr(draft_opd_trl, name, None) is None]
    assert missing == []
    assert set(draft_opd_trl.__all__) <= set(dir(draft_opd_trl))


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        draft_opd_trl.no_such_name  # noqa: B018


def test_version_is_that_of_setup_cfg_and_of_the_citation():
    metadata = configparser.ConfigParser()
    assert metadata.read(ROOT / "setup.cfg")
    assert draft_opd_trl.__version__ == metadata["metadata"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert draft_opd_trl.__version__ == citation["version"]


def test_version_is_the_installed_one():
    try:
        installed = importlib.metadata.version("draft_opd_trl")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("draft_opd_trl is imported from the source tree, not installed")
    assert draft_opd_trl.__version__ == installed


def test_package_is_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_every_file_beside_the_modules_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["draft_opd_trl"].split()
    named = {file for pattern in patterns for file in PACKAGE.glob(pattern)}
    # Python outside a package, as that of metrics, is a file like any other.
    there = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    modules = {file for file in there if file.suffix == ".py" and (file.parent / "__init__.py").is_file()}
    assert there - modules - named == set()
