"""Drafter folders: recognise, read and convert them, with exact key sets.

Both serving engines load a checkpoint with missing tensors silently. So reading starts every parameter as NaN,
compares names, shapes and dtypes, and looks for survivors. Knows no training state.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from .drafters import DRAFTERS
from .drafters.base import Drafter, check_tensors
from .errors import ExistsError, InputError, NotFoundError
from .target import TargetShape
from .target_folder import read_target_config


def drafter_folder(path_or_id: str, revision: str | None = None, token: str | None = None) -> Path:
    """
    The local folder of a drafter; an id is downloaded from the Hub.

    Raises:
        `FileNotFoundError`: Neither a folder nor reachable on the Hub.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    try:
        # Subfolders hold a Trainer's checkpoints, optimizer state and all.
        return Path(snapshot_download(path_or_id, revision=revision, token=token, ignore_patterns="*/*"))
    except Exception as error:
        why = "it is no id" if isinstance(error, HFValidationError) else " ".join(str(error).split())
        raise NotFoundError(
            f"{path_or_id!r} is not a folder here and could not be fetched from the Hub ({why}). Give the path of "
            "a drafter folder, or an id you can reach."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        `FileNotFoundError`: The folder has no `config.json`.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise NotFoundError(f"{folder} holds no config.json, so it is not a drafter folder.")
    return json.loads(config_file.read_text())


def drafter_class_of(config: dict[str, Any], folder: Path) -> type[Drafter]:
    """
    The class that reads a folder with this `config.json`.

    Raises:
        `ValueError`: None does.
    """
    architectures = config.get("architectures") or []
    for drafter_class in DRAFTERS.values():
        if drafter_class.recognises(config):
            return drafter_class
    known = ", ".join(f"{drafter_class.__name__} ({kind})" for kind, drafter_class in DRAFTERS.items())
    raise InputError(
        f"{folder / 'config.json'} names the architectures {architectures}, none of which is a drafter known here: "
        f"{known}. Is this the folder of a drafter, not of a target?"
    )


def load_drafter_config(path_or_id: str | Path, **hub: Any) -> PreTrainedConfig:
    """
    The config of a drafter, without its weights.

    Args:
        path_or_id (`str` or `Path`): Folder, or id on the Hub.
        hub: `revision` and `token`, for the Hub.

    Raises:
        `OSError`: No `config.json` there.
        `ValueError`: Unknown architecture.
    """
    try:
        written, _ = PreTrainedConfig.get_config_dict(path_or_id, **hub)
    except OSError as error:
        raise NotFoundError(
            f"The drafter {str(path_or_id)!r} has no config.json that can be read, here or on the Hub "
            f"({' '.join(str(error).split())}). Give the path of a drafter folder, or an id you can reach."
        ) from error
    if not written and not (Path(path_or_id) / "config.json").is_file():
        raise NotFoundError(f"{path_or_id} holds no config.json, so it is not a drafter folder.")
    config_class = drafter_class_of(written, Path(path_or_id)).config_class
    if "speculators_model_type" in written:
        return config_class.from_speculators(written)
    return config_class.from_pretrained(path_or_id, **hub)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """
    Every tensor of a folder, under its own name; pickles are read without running code.

    Raises:
        `FileNotFoundError`: The folder has no weights.
    """
    files, pickles = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise NotFoundError(f"{folder} holds no *.safetensors file and no pytorch_model*.bin.")
    tensors = {}
    for file in [] if files else pickles:
        tensors.update(torch.load(file, map_location="cpu", weights_only=True))
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return tensors


def _merge_adapter(folder: Path, dtype: torch.dtype | str, token: str | None) -> Drafter:
    """The drafter an adapter was trained on, with the adapter merged into its weights."""
    config = PeftConfig.from_pretrained(folder)
    if not config.base_model_name_or_path:
        raise InputError(
            f"{folder / 'adapter_config.json'} does not name the drafter it was trained on, as that was an instance "
            "without a path. Write the path to `base_model_name_or_path` there."
        )
    drafter = load_drafter(config.base_model_name_or_path, dtype, config.revision, token)
    trainable = {name: parameter.requires_grad for name, parameter in drafter.named_parameters()}
    drafter = PeftModel.from_pretrained(drafter, str(folder)).merge_and_unload(safe_merge=True)
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_(trainable[name])
    return drafter.eval()


def load_drafter(
    path_or_id: str,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    token: str | None = None,
) -> Drafter:
    """
    Read a drafter folder, whole or not at all; an adapter's folder as its base drafter with the adapter merged in.

    Layouts: DFlash as z-lab publishes it, EAGLE-3 as SpecForge, SGLang and SafeAILab do, and vLLM's `speculators`.

    Args:
        path_or_id (`str`): Folder, or id on the Hub.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): Parameters are cast to it; training
            wants float32 masters. `"auto"` keeps the stored one.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        [`Drafter`], not yet bound to a target.

    Raises:
        `FileNotFoundError`: No such folder, config or weights.
        `ValueError`: Unknown architecture, a config that asks for what is not computed here, or a tensor missing,
            unexpected, misshapen, of the wrong dtype or not finite, or an adapter that does not name its base.
    """
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype {dtype!r} is none of PyTorch's. Use 'auto', 'bfloat16' or 'float32'.")
    folder = drafter_folder(path_or_id, revision, token)
    if (folder / "adapter_config.json").is_file():
        return _merge_adapter(folder, dtype, token)
    drafter_class = drafter_class_of(read_config(folder), folder)
    config = load_drafter_config(folder)
    tensors = drafter_class.canonical_tensors(read_tensors(folder), config)
    drafter = drafter_class(config)
    check_tensors(drafter.state_dict(), tensors, folder)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.fill_(float("nan"))
    if dtype == "auto":
        dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # Parameters alone: `drafter.to(dtype)` would round the rotary frequencies too, and turn far positions wrongly.
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    drafter.load_state_dict(tensors, strict=True)
    bad = [name for name, parameter in drafter.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise InputError(f"{folder} holds values that are not finite in {bad}; the checkpoint is damaged.")
    drafter.name_or_path = drafter.config._name_or_path = str(path_or_id)
    return drafter.eval()


def _write_speculators(drafter: Drafter, folder: Path, target_name: str, target_architectures: list[str]) -> None:
    config = {
        **drafter.config.to_speculators(),
        "speculators_config": {
            "algorithm": drafter.kind,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafter.num_draft_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": target_architectures},
        },
    }
    # `speculators` numbers the layers of every kind.
    tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in drafter.state_dict().items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def export_drafter(
    path_or_id: str,
    output_dir: str,
    format: str,
    target: str | None = None,
    target_name: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    token: str | None = None,
) -> Drafter:
    """
    Write a drafter as a new folder in another layout, and read it back.

    Args:
        path_or_id (`str`): Folder in any layout that [`load_drafter`] reads, or id on the Hub.
        output_dir (`str`): New folder; it appears when it is complete.
        format (`str`): `"dflash"` or `"eagle3"`, whichever the drafter is, for the flat folder that SGLang and vLLM
            load; `"speculators"` for vLLM's.
        target (`str`, *optional*): Folder or id of the target, of which the config alone is read. The drafter is
            checked against it, and what its config leaves open is settled.
        target_name (`str`, *optional*): Id that a `speculators` folder names its target by; `target` by default. Of a
            folder that names a path, `vllm serve FOLDER` is refused.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): Of the weights; the stored one by default.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        [`Drafter`], as read back from `output_dir`.

    Raises:
        `FileExistsError`: `output_dir` is there and not empty.
        `ValueError`: The drafter is of another kind, does not fit the target, or `"speculators"` without a target.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExistsError(f"{folder} is there already and not empty. Give a new folder.")
    drafter = load_drafter(path_or_id, dtype, revision, token)
    if format not in (drafter.kind, "speculators"):
        raise InputError(
            f"{path_or_id} holds a drafter of kind {drafter.kind}, which cannot be written as {format!r}. Choose "
            f"{drafter.kind!r} or 'speculators'."
        )
    if target is None and format == "speculators":
        raise InputError("A speculators folder names its target, and vLLM serves it by that name: give `target`.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if target is not None:
        target_config = read_target_config(target)
        drafter.fit(TargetShape(target_config))
    if format == "speculators":
        _write_speculators(drafter, part, target_name or target, target_config.architectures or [])
    else:
        drafter.save_pretrained(part)
    written = load_drafter(str(part), "auto")
    os.replace(part, folder)
    written.config._name_or_path = str(folder)
    return written
