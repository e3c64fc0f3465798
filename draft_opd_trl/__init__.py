"""Draft-OPD for the Hugging Face ecosystem: make a speculative-decoding drafter better on its own proposals."""

import importlib
import logging
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .acceptance import AcceptanceReport, bootstrap_interval
    from .checkpoints import export_drafter, load_drafter
    from .config import DraftOPDConfig
    from .drafters import DRAFTERS, create_drafter
    from .evaluation import evaluate_drafters, measure_acceptance
    from .hub import push_drafter
    from .inspection import inspect_drafter
    from .optim import MuonWithAdamW
    from .report import acceptance_table, plot_acceptance
    from .sampling_params import SamplingParams
    from .speculation import SpeculationSettings, speculate
    from .suites import load_suite
    from .target import Target, stop_token_ids
    from .traces import Trace, trace_texts
    from .trainer import DraftOPDTrainer
    from .viewer import print_traces, write_trace_page
    from .vocabulary import draft_vocabulary

# peft imports bitsandbytes, which warns, unasked, of a CPU kernel that only a 4-bit target on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.1.0.dev0"

__all__ = [
    "AcceptanceReport",
    "DRAFTERS",
    "DraftOPDConfig",
    "DraftOPDTrainer",
    "MuonWithAdamW",
    "SamplingParams",
    "SpeculationSettings",
    "Target",
    "Trace",
    "acceptance_table",
    "bootstrap_interval",
    "create_drafter",
    "draft_vocabulary",
    "evaluate_drafters",
    "export_drafter",
    "inspect_drafter",
    "load_drafter",
    "load_suite",
    "measure_acceptance",
    "plot_acceptance",
    "print_traces",
    "push_drafter",
    "speculate",
    "stop_token_ids",
    "trace_texts",
    "write_trace_page",
]
# Where each public name lives.
_HOME = {
    "DRAFTERS": "drafters",
    "AcceptanceReport": "acceptance",
    "DraftOPDConfig": "config",
    "DraftOPDTrainer": "trainer",
    "MuonWithAdamW": "optim",
    "SamplingParams": "sampling_params",
    "SpeculationSettings": "speculation",
    "Target": "target",
    "Trace": "traces",
    "acceptance_table": "report",
    "bootstrap_interval": "acceptance",
    "create_drafter": "drafters",
    "draft_vocabulary": "vocabulary",
    "evaluate_drafters": "evaluation",
    "export_drafter": "checkpoints",
    "inspect_drafter": "inspection",
    "load_drafter": "checkpoints",
    "load_suite": "suites",
    "measure_acceptance": "evaluation",
    "plot_acceptance": "report",
    "print_traces": "viewer",
    "push_drafter": "hub",
    "speculate": "speculation",
    "stop_token_ids": "target",
    "trace_texts": "traces",
    "write_trace_page": "viewer",
}


def __getattr__(name: str) -> object:
    # Lazy: importing the package must not pull transformers' modelling code or TRL's trainers.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
