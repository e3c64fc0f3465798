"""What a drafter folder is, who loads it, how to serve it, and what is wrong with it, in words.

Judges files and changes none. What each engine reads was found in SGLang 0.5.23 and vLLM 0.33.0, and is held to their
own loaders by `make test-serving`.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..core.errors import InputError, NotFoundError
from ..core.target_shape import TargetShape
from ..drafters.base import Drafter
from .adapters import is_adapter, read_adapter
from .checkpoints import drafter_class_of, drafter_folder, load_drafter, load_target_shape, read_config
from .folder_files import read_tensors, stray_weights
from .known_families import told_of_family
from .serving import ENGINES, launch_commands, serves, serving_faults


LOADERS = ("draft_opd_trl", "SGLang", "vLLM", "transformers")
# What is the matter, and which loaders refuse the folder for it or draft otherwise than the drafter was trained.
Fault = tuple[str, set[str]]


def _verifier(written: dict[str, Any]) -> str | None:
    return ((written.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path")


def _layout(written: dict[str, Any], drafter_class: type[Drafter]) -> str:
    spec = "speculators_model_type" in written
    return "speculators (vLLM)" if spec else drafter_class.config_class.layout(written)


def _code_is_there(folder: Path, reference: Any) -> bool:
    """Whether a folder holds the file that `auto_map` names, and those that transformers finds imported in it."""
    waiting = [reference.split("--")[-1].partition(".")[0]] if isinstance(reference, str) else [""]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if not re.fullmatch(r"\w+", name) or not (folder / f"{name}.py").is_file():
            return False
        seen.add(name)
        source = (folder / f"{name}.py").read_text(encoding="utf-8", errors="replace")
        waiting += set(re.findall(r"^from \.(\w+) import", source, flags=re.M)) - seen
    return True


def _config_faults(
    folder: Path, written: dict[str, Any], names: set[str], drafter_class: type[Drafter]
) -> list[Fault]:
    """What the config alone tells, before anything is loaded."""
    faults: list[Fault] = []
    if "speculators_model_type" in written:
        faults.append(("it is in the speculators layout, which vLLM alone reads", {"SGLang", "transformers"}))
        verifier = _verifier(written) or ""
        if verifier.count("/") > 1 or Path(verifier).is_dir():
            faults.append((f"its target is named by a path, {verifier}: `vllm serve FOLDER` wants an id", set()))
    elif drafter_class.code_travels:
        loader = drafter_class.auto_class
        if not _code_is_there(folder, (written.get("auto_map") or {}).get(loader)):
            faults.append((f"the code that {loader} needs is not beside the weights", {"transformers"}))
    faults += drafter_class.config_class.engine_faults(written, names)
    if stray := stray_weights(folder):
        faults.append((f"{stray} are not its weights, and engines read them all the same", {"SGLang", "vLLM"}))
    return faults


def _target_faults(drafter: Drafter, shape: TargetShape | None) -> list[Fault]:
    """What does not fit the target; of an unknown one, the least that it must be is assumed."""
    config, faults = drafter.config, []
    if shape is None:
        taps = getattr(config, "target_layer_ids", None)
        shape = SimpleNamespace(
            name="it was made for",
            config=config,
            hidden_size=getattr(config, "target_hidden_size", config.hidden_size),
            vocab_size=config.vocab_size,
            num_layers=getattr(config, "num_target_layers", None) or max(taps or [8]) + 2,
        )
    else:
        for told, engine, served in serving_faults(drafter, shape.config.model_type):
            faults.append((told, {engine} if served is False else set()))
    context = getattr(shape.config, "max_position_embeddings", None) or 0
    if config.max_position_embeddings < context:
        faults.append(
            (
                f"max_position_embeddings {config.max_position_embeddings} is less than the target's {context}, for "
                "which SGLang may refuse to start (vLLM raises it itself)",
                {"SGLang"},
            )
        )
    try:
        drafter.fit(shape)
    except ValueError as error:
        faults.append((str(error), set(LOADERS)))
    return faults


def inspect_drafter(
    path_or_id: str, target: str | None = None, revision: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """
    Look at a drafter folder as each loader would.

    Args:
        path_or_id (`str`): Folder in any layout that [`load_drafter`] reads, adapters included, or id on the Hub.
        target (`str`, *optional*): Folder or id of its target, of which the config alone is read. Without it, what
            depends on the target's type, context and depth is not judged.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        JSON-able `dict`: `path`, `kind`, `layout`, `base` (of an adapter, the drafter it was trained on),
        `num_parameters`, `dtypes` (dtype → tensors), `config` (what matters of it), `target_family` (what it was found
        to be good for, in words; `None` without `target`), `faults` (`fault` in words, and which loaders it `breaks`:
        they refuse the folder, or draft otherwise than trained), `loads` (loader → `bool`, or `None` where it is not
        known), `launch` (engine → command, where it loads or that is not known).

    Raises:
        `FileNotFoundError`: No such folder, config or weights.
        `ValueError`: Not a drafter's folder, or one whose files are damaged.
    """
    folder = drafter_folder(path_or_id, revision, token)
    shape = load_target_shape(target) if target else None
    if is_adapter(folder):
        return _inspect_adapter(folder, path_or_id, shape)
    written = read_config(folder)
    drafter_class = drafter_class_of(written, folder)
    tensors = read_tensors(folder)
    faults = _config_faults(folder, written, set(tensors), drafter_class)
    if len({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}) > 1:
        faults.append(("weights are stored in several dtypes; engines cast all to the target's", set()))
    drafter, more = _load(str(folder), shape)
    told = _told(path_or_id, drafter, tensors, faults + more, shape)
    if drafter is not None:
        commands = launch_commands(drafter, target or _verifier(written) or "TARGET", path_or_id)
        told["launch"] = {engine: commands[engine] for engine in commands if told["loads"][engine] is not False}
    return {**told, "kind": drafter_class.kind, "layout": _layout(written, drafter_class)}


def _load(path: str, shape: TargetShape | None) -> tuple[Drafter | None, list[Fault]]:
    """The drafter, if it can be read, and what is found on the way."""
    try:
        drafter = load_drafter(path)
    except (InputError, NotFoundError) as error:
        # Where a tensor is missing or unknown, engines load without a word.
        return None, [(str(error), set(LOADERS))]
    return drafter, _target_faults(drafter, shape)


def _told(
    path: str,
    drafter: Drafter | None,
    tensors: dict[str, torch.Tensor],
    faults: list[Fault],
    shape: TargetShape | None,
) -> dict[str, Any]:
    """What is said of every folder."""
    config = {}
    if drafter is not None:
        fields = drafter.config
        config = {
            "num_draft_tokens": drafter.num_draft_tokens,
            "target_layer_ids": drafter.target_layer_ids,
            "vocab_size": fields.vocab_size,
            "draft_vocab_size": getattr(fields, "draft_vocab_size", fields.vocab_size),
            "max_position_embeddings": fields.max_position_embeddings,
            "rope_theta": (getattr(fields, "rope_parameters", None) or {}).get("rope_theta"),
        }
    loads: dict[str, bool | None] = dict.fromkeys(LOADERS, True)
    if drafter is not None:
        served = drafter.config.served_targets
        loads |= {engine: serves(engine, drafter, shape.config.model_type) for engine in ENGINES if shape is not None}
        loads |= {engine: None for engine in ENGINES if engine not in served}
    broken = set().union(*(breaks for _, breaks in faults))
    return {
        "path": path,
        "kind": None if drafter is None else drafter.kind,
        "layout": None,
        "base": None,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "config": config,
        "faults": [{"fault": fault, "breaks": sorted(breaks)} for fault, breaks in faults],
        "target_family": shape and told_of_family(shape.config.model_type),
        "loads": {loader: known and loader not in broken if known else known for loader, known in loads.items()},
        "launch": {},
    }


def _inspect_adapter(folder: Path, path: str, shape: TargetShape | None) -> dict[str, Any]:
    """An adapter's folder: whose it is, and what it takes to serve it."""
    adapter = read_adapter(folder)
    drafter, faults = _load(str(folder), shape)
    kind = "KIND" if drafter is None else drafter.kind
    command = f"draft-opd export {shlex.quote(path)} --output_dir DIR --format {kind}"
    faults.insert(
        0,
        (
            f"it is an adapter, and engines and AutoModel load whole drafters: `{command}` writes one",
            {"SGLang", "vLLM", "transformers"},
        ),
    )
    told = _told(path, drafter, adapter.tensors, faults, shape)
    return {**told, "layout": f"adapter ({adapter.method})", "base": adapter.config.base_model_name_or_path or None}
