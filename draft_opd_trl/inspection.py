"""What a drafter folder is, who loads it, how to serve it, and what is wrong with it, in words.

Judges files and changes none. What each engine reads was found in SGLang 0.5.23 and vLLM 0.33.0, and is held to their
own loaders by `make test-serving`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .checkpoints import drafter_class_of, drafter_folder, load_drafter, read_config, read_tensors
from .drafters.base import Drafter
from .serving import launch_commands
from .target import TargetShape
from .target_folder import read_target_config


LOADERS = ("draft_opd_trl", "SGLang", "vLLM", "transformers")
# What is the matter, and which loaders refuse the folder for it or draft otherwise than the drafter was trained.
Fault = tuple[str, set[str]]


def _layout(written: dict[str, Any], drafter_class: type[Drafter]) -> str:
    if "speculators_model_type" in written:
        return "speculators (vLLM)"
    published = drafter_class.__name__ in (written.get("architectures") or [])
    return "flat (SGLang, vLLM)" if published else "flat, as SafeAILab publishes it"


def _config_faults(
    folder: Path, written: dict[str, Any], names: set[str], drafter_class: type[Drafter]
) -> list[Fault]:
    """What the config alone tells, before anything is loaded."""
    if "speculators_model_type" in written:
        fields = written.get("transformer_layer_config") or {}
        faults: list[Fault] = [("it is in the speculators layout, which vLLM alone reads", {"SGLang", "transformers"})]
        verifier = (written.get("speculators_config") or {}).get("verifier", {}).get("name_or_path") or ""
        if verifier.count("/") > 1 or Path(verifier).is_dir():
            faults.append((f"its target is named by a path, {verifier}: `vllm serve FOLDER` wants an id", set()))
    else:
        fields, faults = written, drafter_class.config_class.engine_faults(written, names)
        reference = (written.get("auto_map") or {}).get("AutoModel", "")
        if not (folder / f"{reference.split('--')[-1].partition('.')[0]}.py").is_file():
            faults.append(("the code that AutoModel needs is not beside the weights", {"transformers"}))
    if fields.get("hidden_act", "silu") != "silu":
        faults.append((f"hidden_act is {fields['hidden_act']!r}, and engines compute silu alone", {"SGLang", "vLLM"}))
    top, inner = fields.get("rope_theta"), (fields.get("rope_parameters") or {}).get("rope_theta")
    if top is None and inner is None:
        faults.append(("no rope_theta is written, and each loader has a default of its own", {"SGLang", "vLLM"}))
    elif None not in (top, inner) and top != inner:
        faults.append((f"rope_theta is {top} at the top level and {inner} in rope_parameters", {"SGLang", "vLLM"}))
    return faults


def _target_faults(drafter: Drafter, shape: TargetShape | None) -> list[Fault]:
    """What does not fit the target; of an unknown one, the least that it must be is assumed."""
    config, faults = drafter.config, []
    if shape is None:
        shape = SimpleNamespace(
            name="it was made for",
            config=config,
            hidden_size=getattr(config, "target_hidden_size", config.hidden_size),
            vocab_size=config.vocab_size,
            num_layers=getattr(config, "num_target_layers", None) or max(config.target_layer_ids or [8]) + 2,
        )
    context = shape.config.max_position_embeddings
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
        path_or_id (`str`): Folder in any layout that [`load_drafter`] reads, or id on the Hub.
        target (`str`, *optional*): Folder or id of its target, of which the config alone is read. Without it, what
            depends on the target's context, and for EAGLE-3 on its depth, is not judged.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        JSON-able `dict`: `path`, `kind`, `layout`, `num_parameters`, `dtypes` (dtype → tensors), `config` (what
        matters of it), `faults` (`fault` in words, and which loaders it `breaks`: they refuse the folder, or draft
        otherwise than trained), `loads` (loader → `bool`), `launch` (engine → command, where it loads).

    Raises:
        `FileNotFoundError`: No such folder, config or weights.
        `ValueError`: Not a drafter's folder.
    """
    folder = drafter_folder(path_or_id, revision, token)
    written = read_config(folder)
    drafter_class = drafter_class_of(written, folder)
    tensors = read_tensors(folder)
    faults = _config_faults(folder, written, set(tensors), drafter_class)
    if len({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}) > 1:
        faults.append(("weights are stored in several dtypes; engines cast all to the target's", set()))
    config, commands = {}, {}
    try:
        drafter = load_drafter(str(folder))
    except ValueError as error:
        # Where a tensor is missing or unknown, engines load without a word.
        faults.append((str(error), set(LOADERS)))
    else:
        config = {
            "num_draft_tokens": drafter.num_draft_tokens,
            "target_layer_ids": drafter.config.target_layer_ids,
            "vocab_size": drafter.config.vocab_size,
            "draft_vocab_size": getattr(drafter.config, "draft_vocab_size", drafter.config.vocab_size),
            "max_position_embeddings": drafter.config.max_position_embeddings,
            "rope_theta": drafter.config.rope_parameters["rope_theta"],
        }
        verifier = (written.get("speculators_config") or {}).get("verifier", {}).get("name_or_path")
        faults += _target_faults(drafter, target and TargetShape(read_target_config(target)))
        commands = launch_commands(drafter.kind, target or verifier or "TARGET", path_or_id, drafter.num_draft_tokens)
    broken = set().union(*(breaks for _, breaks in faults))
    return {
        "path": path_or_id,
        "kind": drafter_class.kind,
        "layout": _layout(written, drafter_class),
        "num_parameters": sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        "dtypes": dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        "config": config,
        "faults": [{"fault": fault, "breaks": sorted(breaks)} for fault, breaks in faults],
        "loads": {loader: loader not in broken for loader in LOADERS},
        "launch": {engine: command for engine, command in commands.items() if engine not in broken},
    }
