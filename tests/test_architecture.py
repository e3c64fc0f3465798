"""
Reads the imports of every module and holds them to the picture in docs/source/architecture.md.

Imports run one way: a module may import from its own layer and from those above it in `LAYERS`, without cycles. A
module without a layer fails, so that a new room is placed on purpose. Imports inside functions and under TYPE_CHECKING
count too: what a module names, it knows.
"""

import ast
import importlib.util
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "draft_opd_trl"
NAME = "draft_opd_trl"

# "" is the package's own __init__.py, which collects the public names: nothing inside the package imports it.
LAYERS = (
    (
        "_trl_compat",
        "errors",
        "files",
        "redaction",
        "markdown",
        "checks",
        "limits",
        "metrics",
        "metrics.acceptance_length.acceptance_length",
    ),
    ("records",),
    (
        "sampling_params",
        "sampling",
        "seeding",
        "streams",
        "block_choice",
        "error_buffer",
        "replay_counts",
        "chat_template",
        "prompts",
        "losses",
        "verification",
        "acceptance",
        "cache",
        "optim",
        "vocabulary",
        "serving",
        "folder_files",
        "stopwatch",
        "run_log",
        "endpoint",
    ),
    ("server", "text_cache", "run_state", "interrupts"),
    (
        "target",
        "drafters.base",
        "drafters.block_backbone",
        "drafters.drafter_config",
        "drafters.fields",
        "drafters.parts",
        "config",
        "probing",
    ),
    ("drafters",),
    ("speculation", "consistency"),
    (
        "rollout",
        "replay",
        "evaluation",
        "results",
        "report",
        "adapters",
        "before_after",
        "checkpoints",
        "inspection",
        "model_card",
        "hub",
        "loading",
        "reach",
        "rows",
        "target_folder",
        "sharding",
        "suites",
    ),
    ("batching", "rehearsal"),
    ("traces", "viewer", "callbacks"),
    ("feed", "hub_trainer", "planning"),
    ("resuming", "evaluating_trainer"),
    ("trainer",),
    ("commands",),
    ("cli",),
    ("",),
)
LAYER_OF = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}

# What a room must never know, beyond what its layer already forbids: each name stands for itself and all below it.
MODELS = ("transformers", "trl", "peft", f"{NAME}.cache", f"{NAME}.target", f"{NAME}.drafters")
UNKNOWN_TO = {
    "metrics": (NAME,),  # each is pushed alone, as a Space
    "records": MODELS,
    "verification": MODELS,
    "acceptance": MODELS,
    "losses": MODELS,
    "streams": (*MODELS, f"{NAME}.losses"),
    "block_choice": MODELS,
    "error_buffer": MODELS,
    "replay_counts": MODELS,
    "report": MODELS,
    "before_after": MODELS,
    "stopwatch": MODELS,
    "run_log": (*MODELS, f"{NAME}.losses"),
    "viewer": MODELS,
    "endpoint": MODELS,
    "server": MODELS,
    "text_cache": MODELS,
    "run_state": ("trl", "peft", f"{NAME}.cache", f"{NAME}.target", f"{NAME}.drafters"),
    "target": (f"{NAME}.drafters",),
    "drafters": (f"{NAME}.losses",),
    "speculation": (f"{NAME}.losses", "torch.optim", "datasets", "time"),
    "replay": ("torch.optim",),
}


def _is_within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(ancestor + ".")


SHARED = {"drafters.base", "drafters.block_backbone", "drafters.drafter_config", "drafters.fields", "drafters.parts"}


def _is_concrete_drafter(module: str) -> bool:
    return module.startswith("drafters.") and module not in SHARED


def _same_drafter(module: str, other: str) -> bool:
    """`drafters.x` and `drafters.x_config` are one drafter in two files."""
    return module.split("_")[0] == other.split("_")[0]


def _layer(module: str) -> int | None:
    if module.startswith("commands."):
        return LAYER_OF["commands"]
    return LAYER_OF["drafters"] if _is_concrete_drafter(module) else LAYER_OF.get(module)


def _is_trl_submodule(name: str) -> bool:
    # Finding `trl.x` imports `trl` itself, which is lazy and cheap, and not `trl.x`.
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _modules(package: Path) -> dict[str, Path]:
    """Dotted names inside the package ("drafters.base"; "" for its `__init__.py`) to files."""
    modules = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def _imported_names(module: str, path: Path, tree: ast.Module) -> list[tuple[int, str, bool]]:
    """(line, absolute dotted name, whether written relatively) of everything imported, `from x import y` as "x.y"."""
    names = []
    package = [NAME, *filter(None, module.split("."))]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{base}.{alias.name}", node.level > 0) for alias in node.names]
    return names


def _module_of(name: str, modules: dict[str, Path]) -> str | None:
    """The longest known module that the dotted name lies in, or None for other packages."""
    if not _is_within(name, NAME):
        return None
    inner = name.removeprefix(NAME).removeprefix(".")
    while inner and inner not in modules and inner not in LAYER_OF:
        inner = inner.rpartition(".")[0]
    return inner


def _environment_reads(tree: ast.Module) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            if node.attr in ("environ", "environb", "getenv", "putenv"):
                lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            if {alias.name for alias in node.names} & {"environ", "environb", "getenv", "putenv"}:
                lines.append(node.lineno)
    return lines


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every chain of imports that leads back to where it began, each once, starting from its first name."""
    cycles = []

    def follow(start: str, chain: list[str]) -> None:
        for imported in sorted(graph.get(chain[-1], ())):
            if imported == start:
                cycles.append([*chain, start])
            elif imported > start and imported not in chain:
                follow(start, [*chain, imported])

    for module in sorted(graph):
        follow(module, [module])
    return cycles


def _check_import(module: str, name: str, imported: str | None) -> str | None:
    """Why `module` may not import the dotted `name`, which lies in the package's module `imported`, or None."""
    if _is_within(name, "trl") and name != "trl":
        submodule = name.split(".")[:2]
        if submodule[1] == "experimental":
            return "trl.experimental changes without notice: nothing may import it"
        if module != "_trl_compat" and (name.count(".") > 1 or _is_trl_submodule(".".join(submodule))):
            return "only _trl_compat may import from inside trl"
    for room, unknown in UNKNOWN_TO.items():
        if _is_within(module, room):
            for ancestor in unknown:
                if _is_within(name, ancestor):
                    return f"{room} must not know {ancestor}"
    if imported is None:
        return None
    if _is_concrete_drafter(imported) and module not in ("drafters", "") and not _same_drafter(module, imported):
        if _is_concrete_drafter(module):
            return "drafters do not import each other"
        return "drafter kinds are known to drafters/__init__.py alone: go through DRAFTERS"
    depth = _layer(imported)
    if depth is not None and depth > _layer(module):  # None has its own violation, where the module is read.
        return f"{imported or '__init__'} is below {module}, and imports run from top to bottom"
    return None


def find_violations(package: Path) -> list[str]:
    """Each line "module:line: reason" breaks the picture; an empty list is a house in order."""
    modules = _modules(package)
    violations = []
    graph = {module: set() for module in modules}
    for module, path in modules.items():
        where = module or "__init__"
        if _layer(module) is None:
            violations.append(f"{where}:1: has no layer; place it in LAYERS and in the picture")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        violations += [
            f"{where}:{line}: reads the environment; settings belong in DraftOPDConfig"
            for line in _environment_reads(tree)
        ]
        for line, name, relative in _imported_names(module, path, tree):
            imported = _module_of(name, modules)
            if reason := _check_import(module, name, imported):
                violations.append(f"{where}:{line}: imports {name}: {reason}")
            elif imported is not None:
                graph[module].add(imported)
                if _is_within(module, "drafters") and not relative:
                    violations.append(f"{where}:{line}: imports {name}: drafters import from the package relatively")
    return violations + [f"{cycle[0]}:1: import cycle {' -> '.join(cycle)}" for cycle in _cycles(graph)]


def test_package_keeps_the_layers():
    assert "records" in _modules(PACKAGE), f"no package found at {PACKAGE}"
    assert find_violations(PACKAGE) == []


def _build(root: Path, files: dict[str, str]) -> Path:
    package = root / NAME
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


HOUSE = {
    "__init__.py": "from .trainer import DraftOPDTrainer\nfrom .drafters.dflash import DFlashDrafter",
    "_trl_compat.py": "from trl.trainer.base_trainer import _BaseTrainer\nimport trl.data_utils",
    "records.py": "import torch",
    "config.py": "from ._trl_compat import _BaseConfig",
    "sampling.py": "import torch\nfrom . import records",
    "verification.py": "from .sampling import draw\nfrom .records import DraftBlocks",
    "losses.py": "import torch.nn.functional as F",
    "cache.py": "from transformers.cache_utils import Cache",
    "target.py": "from .cache import PositionCache\nfrom transformers import PreTrainedModel",
    "drafters/__init__.py": "from .base import Drafter\nfrom .dflash import DFlashDrafter\nfrom .. import target",
    "drafters/base.py": "from ..records import DraftBlocks\nfrom ..target import Target",
    "drafters/dflash.py": "from .base import Drafter\nfrom ..sampling import Chooser",
    "drafters/eagle3.py": "from . import base\nfrom .eagle3_config import Eagle3Config\nfrom .parts import rotate",
    "drafters/eagle3_config.py": "from .parts import shape_of",
    "drafters/parts.py": "import torch",
    "speculation.py": "from .drafters import load_drafter\nfrom .drafters.base import Drafter\nimport torch",
    "rollout.py": "from .speculation import speculate",
    "replay.py": "from .rollout import generate\nfrom .losses import reduce",
    "trainer.py": "from trl import TrlParser\nfrom . import replay, losses\nfrom draft_opd_trl.config import Config",
    "commands/train.py": "from ..config import Config\ndef run():\n    from ..trainer import DraftOPDTrainer",
    "cli.py": "from . import commands",
}


def test_checker_accepts_a_house_in_order(tmp_path):
    assert find_violations(_build(tmp_path, HOUSE)) == []


BELOW = "imports run from top to bottom"
COMPAT = "only _trl_compat may import from inside trl"
REGISTRY = "go through DRAFTERS"


@pytest.mark.parametrize(
    ("file", "source", "where", "why"),
    [
        (
            "records.py",
            "import torch\nfrom .sampling import draw",
            "records:2",
            f"sampling is below records, and {BELOW}",
        ),
        ("sampling.py", "import draft_opd_trl.rollout as r", "sampling:1", BELOW),
        ("sampling.py", "if TYPE_CHECKING:\n    from .target import Target", "sampling:2", BELOW),
        ("losses.py", "def f():\n    from .trainer import Trainer", "losses:2", BELOW),
        ("target.py", "from . import speculation", "target:1", BELOW),
        ("trainer.py", "from . import DraftOPDTrainer", "trainer:1", f"__init__ is below trainer, and {BELOW}"),
        (
            "drafters/base.py",
            "from . import DRAFTERS",
            "drafters.base:1",
            f"drafters is below drafters.base, and {BELOW}",
        ),
        ("rollout.py", "from .replay import chain", "replay:1", "import cycle replay -> rollout -> replay"),
        ("shed.py", "import torch", "shed:1", "has no layer"),
        ("scaling/ring.py", "import torch", "scaling.ring:1", "has no layer"),
        ("trainer.py", "from trl.trainer.base_trainer import _BaseTrainer", "trainer:1", COMPAT),
        ("trainer.py", "import trl.data_utils", "trainer:1", COMPAT),
        ("trainer.py", "from trl import data_utils", "trainer:1", COMPAT),
        ("_trl_compat.py", "from trl.experimental.gkd import GKDConfig", "_trl_compat:1", "nothing may import it"),
        ("drafters/eagle3.py", "from .dflash import x", "drafters.eagle3:1", "drafters do not import each other"),
        (
            "drafters/dflash.py",
            "from .eagle3_config import x",
            "drafters.dflash:1",
            "drafters do not import each other",
        ),
        ("drafters/parts.py", "from .dflash import x", "drafters.parts:1", REGISTRY),
        (
            "drafters/dflash.py",
            "from ..losses import x",
            "drafters.dflash:1",
            "drafters must not know draft_opd_trl.losses",
        ),
        ("drafters/dflash.py", "from draft_opd_trl.sampling import x", "drafters.dflash:1", "relatively"),
        ("trainer.py", "from .drafters.dflash import x", "trainer:1", REGISTRY),
        ("checkpoints.py", "from .drafters import dflash", "checkpoints:1", REGISTRY),
        ("verification.py", "from transformers import Cache", "verification:1", "must not know transformers"),
        ("verification.py", "from .cache import PositionCache", "verification:1", "must not know draft_opd_trl.cache"),
        ("records.py", "import transformers", "records:1", "records must not know transformers"),
        ("target.py", "from .drafters.base import Drafter", "target:1", "target must not know draft_opd_trl.drafters"),
        ("speculation.py", "import time", "speculation:1", "speculation must not know time"),
        ("replay.py", "from torch.optim import AdamW", "replay:1", "replay must not know torch.optim"),
        ("trainer.py", "from .commands import train", "trainer:1", BELOW),
        ("config.py", "import os\nx = os.environ['X']", "config:2", "reads the environment"),
        ("config.py", "from os import getenv", "config:1", "reads the environment"),
    ],
)
def test_checker_finds_what_is_wrong(tmp_path, file, source, where, why):
    violations = find_violations(_build(tmp_path, {**HOUSE, file: source}))
    assert len(violations) == 1, violations
    assert violations[0].startswith(f"{where}: ")
    assert why in violations[0]
