"""Drafter folders: recognise, read and convert them, with exact key sets.

Both serving engines load a checkpoint with missing tensors silently. So reading starts every parameter as NaN,
compares names, shapes and dtypes, and looks for survivors. Knows no training state.
"""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..core.errors import InputError, NotFoundError
from ..core.files import atomic_folder, check_new_folder
from ..core.target_shape import TargetShape
from ..drafters import DRAFTERS
from ..drafters.base import Drafter, check_tensors
from ..drafters.fields import check_fields
from .adapters import Adapter, is_adapter, merge, read_adapter
from .folder_files import one_line, read_ending, read_json, read_tensors
from .target_folder import read_target_config


# Of a config.json, what says how a machine runs a model, or what it is told to return, and nothing of the drafter.
_NOT_THE_DRAFTERS = set(
    "attn_implementation dtype experts_implementation id2label label2id num_labels output_attentions "
    "output_hidden_states per_layer_config return_dict torch_dtype".split()
)
# What building a config or a model out of a stranger's values raises.
CONFIG_FAULTS = (AssertionError, AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError)
CONFIG_FAULTS += (StrictDataclassError, ValueError, ZeroDivisionError)


def drafter_folder(
    path_or_id: str, revision: str | None = None, token: str | None = None, files: list[str] | None = None
) -> Path:
    """
    The local folder of a drafter; of an id, `files` alone or all are downloaded from the Hub.

    Raises:
        `FileNotFoundError`: Neither a folder nor reachable on the Hub.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        return folder
    try:
        # Subfolders hold a Trainer's checkpoints, optimizer state and all.
        only = {"allow_patterns": files} if files else {"ignore_patterns": "*/*"}
        return Path(snapshot_download(path_or_id, revision=revision, token=token, **only))
    except Exception as error:
        why = "it is no id" if isinstance(error, HFValidationError) else " ".join(str(error).split())
        raise NotFoundError(
            f"The drafter {path_or_id!r} is not a folder here and could not be fetched from the Hub ({why}). Give the "
            "path of a drafter folder, or an id you can reach."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """
    A folder's `config.json`, whose known fields have the types and ranges they must have.

    Raises:
        `FileNotFoundError`: The folder has no `config.json`.
        `ValueError`: It is not JSON, or a field is of the wrong type or beyond its range, by name.
    """
    file = folder / "config.json"
    if not file.exists():
        raise NotFoundError(f"{folder} holds no config.json, so it is not a drafter folder.")
    return _checked(read_json(file), file)


def _checked(written: dict[str, Any], file: Path) -> dict[str, Any]:
    try:
        check_fields(written)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    return written


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
    if adopting := [kind for kind, drafter_class in DRAFTERS.items() if drafter_class.can_adopt(config)]:
        raise InputError(
            f"{folder} holds a plain {architectures[0]} and no drafter. If it is the small model to draft with, "
            f"`draft-opd export {shlex.quote(str(folder))} --format {' or '.join(adopting)} --target TARGET "
            "--output_dir DIR` makes a drafter of it, in DIR. If it is the target, give its drafter here."
        )
    known = ", ".join(f"{drafter_class.__name__} ({kind})" for kind, drafter_class in DRAFTERS.items())
    raise InputError(
        f"{folder / 'config.json'} names the architectures {architectures}, none of which is a drafter known here: "
        f"{known}. Is this the folder of a drafter, not of a target?"
    )


def _drafters_own(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name[:1] != "_" and name not in _NOT_THE_DRAFTERS}


def _config_of(written: dict[str, Any], file: Path) -> PreTrainedConfig:
    """
    The config that a `config.json` makes.

    Raises:
        `ValueError`: Unknown architecture, or what no such config can hold.
    """
    config_class = drafter_class_of(written, file.parent).config_class
    kept = _drafters_own(written)
    if layer := kept.get("transformer_layer_config"):
        kept["transformer_layer_config"] = _drafters_own(layer)
    try:
        if "speculators_model_type" in written:
            return config_class.from_speculators(kept)
        return config_class(**kept)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    except CONFIG_FAULTS as error:
        raise InputError(
            f"{file} holds what a {config_class.__name__} cannot ({one_line(error)}). Correct it, or download or save "
            "the folder again."
        ) from error


def load_drafter_config(path_or_id: str | Path, revision: str | None = None, token: str | None = None) -> Any:
    """
    The config of a drafter, without its weights.

    Args:
        path_or_id (`str` or `Path`): Folder, or id on the Hub.
        revision, token (`str`, *optional*): For the Hub.

    Raises:
        `OSError`: No `config.json` there.
        `ValueError`: Unknown architecture, or a field that cannot be what it is.
    """
    folder = drafter_folder(str(path_or_id), revision, token, ["config.json"])
    return _config_of(read_config(folder), folder / "config.json")


def load_target_shape(target: str) -> TargetShape:
    """
    What the config of a target's folder or id tells.

    Raises:
        `FileNotFoundError`: No such config.
        `ValueError`: Not the config of a language model.
    """
    config = read_target_config(target)
    try:
        return TargetShape(config)
    except CONFIG_FAULTS as error:
        raise InputError(
            f"{target!r} has no config of a target that can be read ({one_line(error)}). Give its folder or id."
        ) from error


def _base_drafter(adapter: Adapter, dtype: torch.dtype | str, token: str | None) -> Drafter:
    """The drafter an adapter was trained on."""
    try:
        folder = drafter_folder(adapter.base, adapter.config.revision, token)
    except NotFoundError as error:
        raise NotFoundError(
            f"The adapter in {adapter.folder} was trained on the drafter {adapter.base!r}, which is not there: {error}"
        ) from error
    if is_adapter(folder):
        raise InputError(
            f"The adapter in {adapter.folder} names {adapter.base!r} as its drafter, which is an adapter itself. "
            "Write the path of a whole drafter to `base_model_name_or_path` in its adapter_config.json."
        )
    return load_drafter(adapter.base, dtype, adapter.config.revision, token)


def _blank(
    drafter_class: type[Drafter], config: PreTrainedConfig, tensors: dict[str, torch.Tensor], folder: Path
) -> Drafter:
    """A drafter of this config, all NaN, once the tensors are known to be its own; compared without memory first."""
    try:
        with torch.device("meta"):
            shape = drafter_class(copy.deepcopy(config)).state_dict()
        check_tensors(shape, tensors, folder)
        drafter = drafter_class(config)
    except InputError:
        raise
    except CONFIG_FAULTS as error:
        raise InputError(
            f"{folder / 'config.json'} describes no {drafter_class.__name__} that can be built ({one_line(error)}). "
            "Correct it, or download or save the folder again."
        ) from error
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.fill_(float("nan"))
    return drafter


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A dtype of weights by its name, or `"auto"`."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise InputError(
            f"dtype {dtype!r} is none of PyTorch's floating-point types of 16 bits or more. Use 'auto', 'bfloat16' or "
            "'float32'."
        )
    return found


def load_drafter(
    path_or_id: str,
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
    token: str | None = None,
) -> Drafter:
    """
    Read a drafter folder, whole or not at all; an adapter's folder as its base drafter with the adapter merged in.

    Layouts: those that each kind is published in, and vLLM's `speculators`.

    Args:
        path_or_id (`str`): Folder, or id on the Hub.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): Parameters are cast to it; training
            wants float32 masters. `"auto"` keeps the stored one.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        [`Drafter`], not yet bound to a target.

    Raises:
        `FileNotFoundError`: No such folder, config or weights.
        `ValueError`: Unknown architecture, a config that asks for what is not computed here or cannot be, damaged
            files, or a tensor missing, unexpected, misshapen, of the wrong dtype or not finite; of an adapter the
            same, and one that does not name its base or changes nothing.
    """
    cast = _checked_dtype(dtype)
    folder = drafter_folder(path_or_id, revision, token)
    if is_adapter(folder):
        adapter = read_adapter(folder)
        return merge(_base_drafter(adapter, dtype, token), adapter)
    written = read_config(folder)
    drafter_class, config = drafter_class_of(written, folder), _config_of(written, folder / "config.json")
    tensors = drafter_class.canonical_tensors(read_tensors(folder), config)
    drafter = _blank(drafter_class, config, tensors, folder)
    stored = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    dtype = stored if cast == "auto" else cast
    # Parameters alone: `drafter.to(dtype)` would round the rotary frequencies too, and turn far positions wrongly.
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)
    drafter.load_state_dict(tensors, strict=True)
    bad = [name for name, parameter in drafter.named_parameters() if not parameter.isfinite().all()]
    if bad:
        raise InputError(f"{folder} holds values that are not finite in {bad}; the checkpoint is damaged.")
    drafter.config.dtype = dtype
    drafter.name_or_path = drafter.config._name_or_path = str(path_or_id)
    return drafter.eval()


def _target_embedding(target: str, shape: TargetShape) -> torch.Tensor:
    """The target's input embedding as it is stored, `(V, H)`; of a sharded target its one file is fetched."""

    def fetch(name: str) -> Path | None:
        if Path(target).is_dir():
            return Path(target, name) if Path(target, name).is_file() else None
        try:
            return Path(hf_hub_download(target, name))
        except (OSError, ValueError):  # not there, or not reached
            return None

    index, file = fetch("model.safetensors.index.json"), None
    if index is None:
        file = fetch("model.safetensors")
    else:
        where = read_json(index).get("weight_map") or {}
        file = next((fetch(where[name]) for name in where if name.endswith("embed_tokens.weight")), None)
    found = None if file is None else read_ending(file, "embed_tokens.weight")
    if found is None or not found.is_floating_point() or found.shape != (shape.vocab_size, shape.hidden_size):
        raise InputError(
            f"A speculators folder of this drafter holds the target's embedding, but {target!r} has none of "
            f"{shape.vocab_size} × {shape.hidden_size} within reach as safetensors. Give `target` as a folder with "
            "its weights, or an id that can be downloaded."
        )
    return found


def _write_speculators(drafter: Drafter, folder: Path, target_name: str, target: str, shape: TargetShape) -> None:
    config = {
        **drafter.config.to_speculators(),
        "speculators_config": {
            "algorithm": drafter.kind,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafter.num_draft_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": shape.architectures},
        },
    }
    tensors = drafter.speculators_tensors(drafter.state_dict(), lambda: _target_embedding(target, shape))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def _adopted(folder: Path, format: str, shape: TargetShape | None, dtype: torch.dtype | str) -> Drafter | None:
    """The drafter that a kind makes of a model which is none yet; `None` where this is no such model and kind."""
    adopting = DRAFTERS.get(format)
    if adopting is None or is_adapter(folder) or not adopting.can_adopt(read_config(folder)):
        return None
    if shape is None:
        raise InputError(f"{folder} is a plain model, and a drafter's vocabulary is its target's: give `target`.")
    return adopting.adopt(str(folder), shape, _checked_dtype(dtype))


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
        path_or_id (`str`): Folder in any layout that [`load_drafter`] reads, or id on the Hub; or a plain language
            model, of which a kind that can makes a drafter.
        output_dir (`str`): New folder; it appears when it is complete.
        format (`str`): The drafter's own kind for the folder that it is published in; `"speculators"` for vLLM's.
        target (`str`, *optional*): Folder or id of the target, of which the config is read, and for a `speculators`
            folder of a kind that borrows it the embedding, which that folder holds. The drafter is checked against
            it, and what its config leaves open is settled.
        target_name (`str`, *optional*): Id that a `speculators` folder names its target by; `target` by default. Of a
            folder that names a path, `vllm serve FOLDER` is refused.
        dtype (`torch.dtype` or `str`, *optional*, defaults to `"auto"`): Of the weights; the stored one by default.
        revision, token (`str`, *optional*): For the Hub.

    Returns:
        [`Drafter`], as read back from `output_dir`.

    Raises:
        `FileExistsError`: `output_dir` is there and not empty.
        `ValueError`: The drafter is of another kind, has no `speculators` layout, does not fit the target, or
            `"speculators"` without a target or without the target's embedding where it is needed.
    """
    folder = Path(output_dir)
    check_new_folder(folder)
    shape = None if target is None else load_target_shape(target)
    drafter = _adopted(drafter_folder(path_or_id, revision, token), format, shape, dtype)
    drafter = drafter or load_drafter(path_or_id, dtype, revision, token)
    if format not in (drafter.kind, "speculators"):
        raise InputError(
            f"{path_or_id} holds a drafter of kind {drafter.kind}, which cannot be written as {format!r}. Choose "
            f"{drafter.kind!r} or 'speculators'."
        )
    if target is None and format == "speculators":
        raise InputError("A speculators folder names its target, and vLLM serves it by that name: give `target`.")
    if shape is not None:
        drafter.fit(shape)
    with atomic_folder(folder) as part:
        if format == "speculators":
            _write_speculators(drafter, part, target_name or target, target, shape)
        else:
            drafter.save_pretrained(part)
        written = load_drafter(str(part), "auto")
    written.name_or_path = written.config._name_or_path = str(folder)
    return written
