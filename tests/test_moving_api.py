"""
What the package uses of other packages beyond their public API, named and checked in one place.

A name that a release takes away fails here, and a new use fails until it is named: where a parent's method is gone, an
override of it is dead code without a word.
"""

import ast
import importlib
from pathlib import Path

import pytest
from conftest import ROOT
from transformers import HfArgumentParser, Trainer
from transformers.cache_utils import CacheLayerMixin
from trl import TrlParser

from draft_opd_trl import _trl_compat
from draft_opd_trl.cli import CommandParser
from draft_opd_trl.core.cache import _PositionLayer
from draft_opd_trl.training.trainer import DraftOPDTrainer


PACKAGE = ROOT / "draft_opd_trl"
# Methods and attributes of the Trainer that ours override, call or read, private by name or by habit.
TRAINER = {
    "_finish_current_push",
    "_get_dataloader",
    "_get_output_dir",
    "_get_train_sampler",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_load_scaler",
    "_prepare_inputs",
    "_push_from_checkpoint",
    "_run_epoch",
    "_save",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
}
TRAINER_ATTRIBUTES = {"_signature_columns", "_train_batch_size"}
PARSER = {"_parse_dataclass_field", "set_defaults_with_config", "parse_args_and_config"}
# Modules that are nobody's public API, and what is taken from them.
MODULES = {
    "datasets.utils": {"logging"},
    "transformers.activations": {"ACT2FN"},
    "transformers.convert_slow_tokenizer": {"bytes_to_unicode"},
    "transformers.cache_utils": {"Cache", "CacheLayerMixin", "LinearAttentionCacheLayerMixin"},
    "transformers.debug_utils": {"DebugOption"},
    "transformers.integrations.integration_utils": {
        "INTEGRATION_TO_CALLBACK",
        "default_logdir",
        "get_available_reporting_integrations",
    },
    "transformers.initialization": {"no_init_weights"},
    "transformers.trainer": {"TRAINING_ARGS_NAME"},
    "transformers.trainer_callback": {"PrinterCallback", "ProgressCallback"},
    "transformers.trainer_pt_utils": {"AcceleratorConfig"},
    "transformers.trainer_utils": {"HubStrategy", "SchedulerType", "TrainOutput"},
    "transformers.training_args": {"OptimizerNames"},
    "transformers.utils.hub": {"PushInProgress"},
}
# Their top level, and what they document as modules to import from.
PUBLIC = {"transformers.utils", "transformers.integrations", "accelerate.utils", "accelerate.logging"}
PUBLIC |= {"huggingface_hub.errors"}
OTHERS = ("transformers", "datasets", "accelerate", "peft", "huggingface_hub")


def _trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def _taken() -> dict[str, set[str]]:
    """Names imported from below the top level of other packages, models' modules aside (those are tested by use)."""
    taken: dict[str, set[str]] = {}
    for _, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in OTHERS:
                below = "." in node.module and not node.module.startswith("transformers.models.")
                if below and node.module not in PUBLIC:
                    taken.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return taken


def _private_to_parents(ours: type, parent: type) -> set[str]:
    """Private names that the package's classes among `ours`' bases share with `parent`."""
    mine = [base for base in ours.__mro__ if base.__module__.startswith("draft_opd_trl")]
    overridden = {name for base in mine for name in vars(base) if name.startswith("_") and not name.startswith("__")}
    read = set()
    files = {importlib.import_module(base.__module__).__file__ for base in mine}
    for node in (node for file in files for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8")))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value
            own = isinstance(owner, ast.Name) and owner.id == "self"
            above = isinstance(owner, ast.Call) and getattr(owner.func, "id", None) == "super"
            if own or above:
                read.add(node.attr)
    return {name for name in overridden | read if hasattr(parent, name)}


def test_all_private_use_is_named():
    assert _taken() == MODULES
    assert _private_to_parents(DraftOPDTrainer, Trainer) == TRAINER
    assert _private_to_parents(CommandParser, TrlParser) == {name for name in PARSER if name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_what_is_taken(module):
    loaded = importlib.import_module(module)
    assert {name for name in MODULES[module] if not hasattr(loaded, name)} == set()


def test_parents_have_what_is_overridden_and_called():
    assert {name for name in TRAINER if not hasattr(Trainer, name)} == set()
    source = Path(importlib.import_module(Trainer.__module__).__file__).read_text(encoding="utf-8")
    assert {name for name in TRAINER_ATTRIBUTES if f"self.{name}" not in source} == set()
    assert {name for name in PARSER if not hasattr(TrlParser, name)} == set()
    assert hasattr(HfArgumentParser, "_parse_dataclass_field")


def test_trl_has_every_name_in_one_file():
    assert {name for name in _trl_compat.__all__ if not hasattr(_trl_compat, name)} == set()


def test_cache_layer_has_every_method_asked_for():
    assert issubclass(_PositionLayer, CacheLayerMixin)
    assert _PositionLayer.__abstractmethods__ == frozenset()
