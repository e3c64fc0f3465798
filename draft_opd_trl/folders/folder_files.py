"""The files of a model folder, read as what a stranger may have written: bounded, whole, and named when damaged.

Knows no models. Which tensors a drafter has is for `checkpoints.py` to say.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from ..core.errors import InputError, NotFoundError


logger = logging.get_logger(__name__)

# The largest JSON file read: an index of a hundred thousand tensors is smaller.
_MAX_JSON_BYTES = 32 * 2**20
_AGAIN = "Download or save the folder again."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON knows")


def read_json(file: Path) -> dict[str, Any]:
    """
    A JSON object.

    Raises:
        `FileNotFoundError`: No such file.
        `ValueError`: Not UTF-8, not JSON, not an object, or too large or too deeply nested to be one of a model's.
    """
    if not file.is_file():
        raise NotFoundError(f"{file} is not there, or is no file. {_AGAIN}")
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise InputError(f"{file} has {file.stat().st_size} bytes, more than a config can have. {_AGAIN}")
        content = json.loads(file.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, InputError):
            raise
        told = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{file} cannot be read as JSON ({told}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not a JSON object. {_AGAIN}")
    return content


def weight_files(folder: Path, stem: str = "model", pickled: str = "pytorch_model") -> dict[Path, set[str] | None]:
    """
    The files that hold a folder's weights, and the tensors that its index says are in each (`None` without an index).

    What transformers reads, in its order: `model.safetensors`, the files of an index, then pickles. Nothing else
    counts as weights, whatever lies beside them: a stray file could replace tensors unseen.

    Args:
        folder (`Path`): Where.
        stem, pickled (`str`, *optional*): Names before the suffixes `.safetensors` and `.bin`.

    Raises:
        `FileNotFoundError`: The folder has no weights, or not all that its index names.
        `ValueError`: The index is damaged, or names files elsewhere.
    """
    for name, suffix in ((stem, "safetensors"), (pickled, "bin")):
        file, index = folder / f"{name}.{suffix}", folder / f"{name}.{suffix}.index.json"
        if file.is_file():
            return {file: None}
        if not index.exists():
            continue
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
            raise InputError(f"{index} has no weight_map of tensors to files. {_AGAIN}")
        shards: dict[Path, set[str] | None] = {folder / shard: set() for shard in where.values()}
        for tensor, shard in where.items():
            shards[folder / shard].add(tensor)
        if odd := sorted(
            {shard for shard in where.values() if Path(shard).name != shard or not shard.endswith(suffix)}
        ):
            raise InputError(f"{index} names {odd[:3]}, which are no {suffix} files in this folder. {_AGAIN}")
        if gone := sorted(shard.name for shard in shards if not shard.is_file()):
            raise NotFoundError(f"{folder} lacks {gone[:3]}, which {index.name} names. {_AGAIN}")
        return shards
    loose = sorted(file.name for file in folder.glob("*.safetensors"))
    told = f", though it has {loose[:3]}: name a single file {stem}.safetensors, or add the index" if loose else ""
    raise NotFoundError(
        f"{folder} holds no *.safetensors file that belongs to it ({stem}.safetensors, or with an index) and no "
        f"{pickled}.bin{told}. {_AGAIN}"
    )


def stray_weights(folder: Path) -> list[str]:
    """Names of safetensors files beside those that count, which engines read all the same."""
    try:
        used = weight_files(folder)
    except (InputError, NotFoundError):
        return []
    return sorted(file.name for file in folder.glob("*.safetensors") if file not in used)


def _from_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def _from_pickle(file: Path) -> dict[str, torch.Tensor]:
    """A pickle's tensors, without running code, and of no more bytes than the file has."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("its parts are compressed, as PyTorch never writes them")
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError("it holds something else than tensors by name")
    for name, tensor in tensors.items():
        # An expanded tensor may claim any size.
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is no plain tensor")
    return tensors


def read_tensors(folder: Path, stem: str = "model", pickled: str = "pytorch_model") -> dict[str, torch.Tensor]:
    """
    Every tensor of a folder, under its own name; see [`weight_files`].

    Raises:
        `FileNotFoundError`: The folder has no weights.
        `ValueError`: A file is damaged, or holds other tensors than the index says.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file, names in weight_files(folder, stem, pickled).items():
        try:
            found = _from_safetensors(file) if file.suffix == ".safetensors" else _from_pickle(file)
        except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError) as error:
            raise InputError(f"{file} is damaged or cut short ({one_line(error)}). {_AGAIN}") from error
        # What a stranger's pickle makes PyTorch's reader raise is not foreseeable, and means nothing else.
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise InputError(f"{file} cannot be read as weights ({one_line(error)}). {_AGAIN}") from error
        if names is not None and names != found.keys():
            raise InputError(f"{file} does not hold the tensors that the index says it does. {_AGAIN}")
        tensors |= found
    if stray := stray_weights(folder) if stem == "model" else []:
        logger.warning(f"{folder} also holds {stray}, which are not read: no index names them.")
    return tensors


def read_ending(file: Path, ending: str) -> torch.Tensor | None:
    """
    The first tensor of a safetensors file whose name ends so, alone; `None` if there is none.

    Raises:
        `ValueError`: The file is damaged.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            name = next((name for name in handle.keys() if name.endswith(ending)), None)  # noqa: SIM118
            return None if name is None else handle.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is damaged or cut short ({one_line(error)}). {_AGAIN}") from error


def one_line(error: Exception) -> str:
    """What a library said, short enough to quote."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
