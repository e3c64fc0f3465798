"""
The contracts of `.importlinter`, and what import-linter cannot say: it reads which module imports which, and not what
is taken from one, nor what code does, nor where it is tested.
"""

import ast
import shutil
import subprocess
import sys
from importlib.util import find_spec, resolve_name
from pathlib import Path

import pytest
from conftest import ROOT


NAME = "draft_opd_trl"
# Each name stands for itself and all below it.
UNKNOWN_TO = {"speculation.py": ("torch.optim",), "replay.py": ("torch.optim",)}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}


# Rooms that are tested as a whole with others: module → its test file. Every other module has a test file of its own.
TESTED_WITH = {
    "_trl_compat.py": "test_moving_api.py",
    "commands/evaluate.py": "commands/test_commands.py",
    "commands/export.py": "folders/test_inspection.py",
    "commands/inspect.py": "folders/test_inspection.py",
    "commands/options.py": "commands/test_commands.py",
    "commands/plan.py": "training/test_planning.py",
    "commands/recipes.py": "commands/test_recipe_files.py",
    "commands/served.py": "evaluation/test_served_causes.py",
    "commands/train.py": "commands/test_commands.py",
    "core/errors.py": "test_cli.py",
    "drafters/block_backbone.py": "drafters/test_dflash.py",
    "drafters/own_vocabulary.py": "drafters/test_eagle3_config.py",
    "drafters/causal_lm_config.py": "drafters/test_causal_lm.py",
    "metrics/acceptance_length/acceptance_length.py": "metrics/test_metrics.py",
}


def _lint(root: Path) -> subprocess.CompletedProcess:
    command = "import importlinter.cli as cli; raise SystemExit(cli.lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, text=True)


def test_package_keeps_the_contracts():
    linted = _lint(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr


# An import that breaks each contract, and how the contract's name begins.
BROKEN = {
    "A room": ("core/sampling.py", "if TYPE_CHECKING:\n    from ..texts.sources import x"),
    "No module": ("texts/chat_template.py", "def f():\n    from .prompts import x"),
    "A kind": ("folders/checkpoints.py", "from ..drafters import dflash"),
    "What holds": ("core/records.py", "import transformers"),
    "Losses": ("training/losses.py", "from ..core.target import Target"),
    "The loop": ("decoding/speculation.py", "import time"),
    "Nothing": ("training/trainer.py", "from .. import DraftOPDTrainer"),
}


def test_contracts_find_what_is_wrong(tmp_path):
    shutil.copytree(ROOT / NAME, tmp_path / NAME, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for file, source in BROKEN.values():
        with (tmp_path / NAME / file).open("a") as stream:
            stream.write(f"\n{source}\n")
    (tmp_path / NAME / "shed.py").touch()
    said = _lint(tmp_path).stdout
    told = [line for line in said.splitlines() if " BROKEN" in line]
    assert [name for name in BROKEN if not any(line.startswith(name) for line in told)] == []
    assert len(told) == len(BROKEN) and "shed" in said


def _imported_names(file: Path, tree: ast.Module) -> list[tuple[int, str, bool]]:
    """(line, absolute dotted name, whether written relatively) of everything imported, `from x import y` as "x.y"."""
    names, package = [], ".".join([NAME, *file.parts[:-1]])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names += [(node.lineno, f"{origin}.{alias.name}", node.level > 0) for alias in node.names]
    return names


def _environment_reads(tree: ast.Module) -> list[int]:
    def of_os(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"

    return [node.lineno for node in ast.walk(tree) if of_os(node) and node.attr in ENVIRONMENT]


def _is_trl_module(name: str) -> bool:
    # Finding `trl.x` imports `trl` itself, which is lazy and cheap, and not `trl.x`.
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _why_not(file: Path, name: str, relative: bool) -> str | None:
    """Why a file may not import the dotted name, or None."""
    if name.startswith("trl."):
        submodule = ".".join(name.split(".")[:2])
        if submodule == "trl.experimental":
            return "trl.experimental changes without notice: nothing may import it"
        if file.name != "_trl_compat.py" and (name.count(".") > 1 or _is_trl_module(submodule)):
            return "only _trl_compat may import from inside trl"
    if name.rpartition(".")[0] == "os" and name.rpartition(".")[2] in ENVIRONMENT:
        return "reads the environment"
    if name.startswith(f"{NAME}.") and file.parts[0] == "drafters" and not relative:
        return "what travels with a drafter imports from the package relatively"
    for unknown in UNKNOWN_TO.get(file.name, ()):
        if f"{name}.".startswith(f"{unknown}."):
            return f"must not know {unknown}"
    return None


def find_violations(file: Path, source: str) -> list[str]:
    """Each line is "file:line: reason", of the source of a file in the package."""
    tree = ast.parse(source)
    found = [(line, _why_not(file, name, relative)) for line, name, relative in _imported_names(file, tree)]
    found += [(line, "reads the environment; settings belong in DraftOPDConfig") for line in _environment_reads(tree)]
    return [f"{file}:{line}: {why}" for line, why in found if why]


def test_package_takes_from_modules_what_it_may():
    files = sorted((ROOT / NAME).rglob("*.py"))
    assert files, "no package found"
    relative = [(file.relative_to(ROOT / NAME), file.read_text("utf-8")) for file in files]
    assert [line for file, source in relative for line in find_violations(file, source)] == []


@pytest.mark.parametrize(
    ("file", "source", "why"),
    [
        ("training/trainer.py", "from trl.trainer.base_trainer import _BaseTrainer", "only _trl_compat"),
        ("training/trainer.py", "import trl.data_utils", "only _trl_compat"),
        ("training/trainer.py", "def f():\n    from trl import data_utils", "only _trl_compat"),
        ("_trl_compat.py", "from trl.experimental.gkd import GKDConfig", "nothing may import it"),
        ("drafters/dflash.py", "from draft_opd_trl.core.sampling import x", "relatively"),
        ("decoding/replay.py", "from torch.optim import AdamW", "must not know torch.optim"),
        ("training/config.py", "import os\nx = os.environ['X']", "reads the environment"),
        ("training/config.py", "from os import getenv", "reads the environment"),
    ],
)
def test_checker_finds_what_is_wrong(file, source, why):
    (line,) = find_violations(Path(file), source)
    assert why in line
    assert find_violations(Path(file), "from trl import TrlParser\nfrom .errors import InputError\nimport os") == []


def test_every_module_has_its_test_file():
    """`tests/` mirrors the package: where a room is tested is known by its name."""
    modules = {file.relative_to(ROOT / NAME) for file in (ROOT / NAME).rglob("*.py") if file.name != "__init__.py"}
    own = {module for module in modules if (ROOT / "tests" / module.parent / f"test_{module.name}").is_file()}
    with_others = {Path(module) for module in TESTED_WITH}
    missing = sorted(f"tests/{module.parent}/test_{module.name}" for module in modules - own - with_others)
    assert missing == [], "write these test files, or say in TESTED_WITH where the modules are tested"
    assert with_others & own == with_others - modules == set(), "these are not tested with others"
    assert [file for file in TESTED_WITH.values() if not (ROOT / "tests" / file).is_file()] == []
