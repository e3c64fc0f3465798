"""Drafter folders: recognise, read and write them, with exact key sets.

Both serving engines load a checkpoint with missing tensors silently. So reading starts every parameter as NaN,
compares the key set by name, and looks for survivors. Knows no training state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import PreTrainedConfig

from .drafters import DRAFTERS
from .drafters.base import Drafter, check_keys


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
        raise FileNotFoundError(
            f"{path_or_id!r} is not a folder here and could not be fetched from the Hub ({error}). Give the path of "
            "a drafter folder, or an id you can reach."
        ) from error


def load_drafter_config(path_or_id: str, **hub: Any) -> PreTrainedConfig:
    """
    The config of a drafter, without its weights.

    Args:
        path_or_id (`str`): Folder, or id on the Hub.
        hub: `revision` and `token`, for the Hub.

    Raises:
        `OSError`: No `config.json` there.
        `ValueError`: Unknown architecture.
    """
    config, _ = PreTrainedConfig.get_config_dict(path_or_id, **hub)
    return DRAFTERS[_kind_of(config, Path(path_or_id))].config_class.from_pretrained(path_or_id, **hub)


def _kind_of(config: dict[str, Any], folder: Path) -> str:
    architectures = config.get("architectures") or []
    for kind, drafter_class in DRAFTERS.items():
        if drafter_class.recognises(config):
            return kind
    known = ", ".join(f"{drafter_class.__name__} ({kind})" for kind, drafter_class in DRAFTERS.items())
    raise ValueError(
        f"{folder / 'config.json'} names the architectures {architectures}, none of which is a drafter known here: "
        f"{known}. Is this the folder of a drafter, not of a target?"
    )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    files, pickles = sorted(folder.glob("*.safetensors")), sorted(folder.glob("pytorch_model*.bin"))
    if not files and not pickles:
        raise FileNotFoundError(f"{folder} holds no *.safetensors file and no pytorch_model*.bin.")
    tensors = {}
    for file in [] if files else pickles:
        tensors.update(torch.load(file, map_location="cpu", weights_only=True))
    for file in files:
        with safe_open(file, framework="pt") as handle:
            tensors.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    return tensors


def load_drafter(
    path_or_id: str,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    token: str | None = None,
) -> Drafter:
    """
    Read a drafter folder, whole or not at all.

    Args:
        path_or_id (`str`): Folder, or id on the Hub.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): Parameters are cast to it; training
            wants float32 masters. `"auto"` keeps the stored one.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        [`Drafter`], not yet bound to a target.

    Raises:
        `FileNotFoundError`: No such folder, config or weights.
        `ValueError`: Unknown architecture, or a tensor missing, unexpected, misshapen or not finite.
    """
    folder = drafter_folder(path_or_id, revision, token)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is not a drafter folder.")
    kind = _kind_of(json.loads(config_file.read_text()), folder)
    drafter_class = DRAFTERS[kind]
    config = drafter_class.config_class.from_pretrained(folder)
    tensors = drafter_class.canonical_tensors(_read_tensors(folder), config)
    drafter = drafter_class(config)
    check_keys(*({k: v.shape for k, v in state.items()} for state in (drafter.state_dict(), tensors)), folder)
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
        raise ValueError(f"{folder} holds values that are not finite in {bad}; the checkpoint is damaged.")
    drafter.config._name_or_path = str(path_or_id)
    return drafter.eval()
