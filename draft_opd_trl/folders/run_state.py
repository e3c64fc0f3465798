"""Checkpoints of a run: whole or not there, whatever instant it stops at, and which of them it goes on from.

A checkpoint is written under `_saving/`, gets a manifest as its last file (the size and hash of every other), and
takes its name by one rename. What a run reads back holds tensors and plain values, so that reading it runs nothing.
Knows folders, and no trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..core.errors import ExistsError, InputError, NotFoundError
from ..core.files import flush, write_atomically


logger = logging.get_logger(__name__)

MANIFEST = "draft_opd_checkpoint.json"
ASIDE = "_saving"  # Pushes leave out what begins with an underscore.
TRAINER_STATE = "trainer_state.json"


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """Folders named `checkpoint-<step>`, whole or not, by step."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    return sorted((path for path in found if found[path] and path.is_dir()), key=lambda path: int(found[path][1]))


# -- whole or not -----------------------------------------------------------------------------------------------------


def write_manifest(folder: str | os.PathLike, step: int, settings: dict[str, Any]) -> None:
    """
    Say that a checkpoint is whole, once all of it is on the disk.

    Args:
        folder (`str` or `os.PathLike`): Holds everything else already.
        step (`int`): Optimizer step.
        settings (`dict`): Of the run, by name, to tell it from others; as JSON can hold it.
    """
    folder = Path(folder)
    flush(folder)
    files = {name: [file.stat().st_size, _digest(file)] for name, file in _files(folder).items() if name != MANIFEST}
    write_atomically(folder / MANIFEST, json.dumps({"step": step, "settings": settings, "files": files}, indent=2))


def read_manifest(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What [`write_manifest`] wrote, or `None` where nothing of that form stands."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        plain = isinstance(manifest["settings"], dict) and isinstance(manifest["step"], int)
        listed = all(isinstance(size, int) and isinstance(digest, str) for size, digest in manifest["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return manifest if plain and listed else None


def fault_of(folder: str | os.PathLike, read: bool = True) -> str | None:
    """
    Why no run can go on from a checkpoint, as the end of a sentence that begins with its name; `None` if one can.

    Args:
        folder (`str` or `os.PathLike`): The checkpoint.
        read (`bool`, *optional*, defaults to `True`): Compare every file's hash, not its size alone.
    """
    return _damage(Path(folder), read) or _lack(Path(folder))


def _damage(folder: Path, read: bool) -> str | None:
    """Where a folder differs from what was saved."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"has no {MANIFEST}, its last file: it was not saved to the end, or by an older version"
    # Only what lies in the folder is opened, whatever the manifest names.
    present = _files(folder)
    for name, (size, digest) in manifest["files"].items():
        if name not in present:
            return f"lacks {name}"
        if present[name].stat().st_size != size or (read and _digest(present[name]) != digest):
            return f"holds another {name} than was saved"
    return None


def _lack(folder: Path) -> str | None:
    """What a run needs to go on, and a whole folder does not hold."""
    if not (folder / TRAINER_STATE).is_file():
        return f"lacks {TRAINER_STATE}"
    if not any(folder.glob("rng_state*")):
        return "was saved with save_only_model=True, without what a run goes on with"
    return None


def _files(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# -- which one to go on from ------------------------------------------------------------------------------------------


def newest_whole_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest step that a run can go on from. A warning names each that is passed over."""
    for folder in reversed(checkpoints_in(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            return folder
        logger.warning_once(f"Passed over {folder}: it {fault}.")
    return None


def find_checkpoint(resume: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume (`str` or `bool`, *optional*): `True` or `"true"` for the newest whole one in `output_dir`, a path for
            that one, nothing (`None`, `False`, `"false"`) for a new run.
        output_dir (`str` or `os.PathLike`): The run's folder.

    Raises:
        `FileNotFoundError`: There is none.
        `ValueError`: No run can go on from it.
    """
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    if not resume:
        return None
    if resume is True:
        if (found := newest_whole_checkpoint(output_dir)) is not None:
            return found
        broken = "".join(f"; {folder.name} {fault_of(folder)}" for folder in checkpoints_in(output_dir))
        raise NotFoundError(
            f"resume_from_checkpoint is True, but {output_dir} holds no whole checkpoint{broken}. Give the path of "
            "one, or start anew without resume_from_checkpoint (in another output_dir, if there are broken ones)."
        )
    if not Path(resume).is_dir():
        raise NotFoundError(
            f"resume_from_checkpoint is {resume!r}, which is no folder here. Give the path of a checkpoint, or True "
            f"for the newest one in {output_dir}."
        )
    if (fault := fault_of(resume)) is not None:
        raise InputError(
            f"resume_from_checkpoint is {resume!r}, which {fault}. Give another checkpoint, or True for the newest "
            f"whole one in {output_dir}."
        )
    return Path(resume)


def first_checkpoint(
    resume: str | bool | None, output_dir: str | os.PathLike, settings: dict[str, Any]
) -> Path | None:
    """
    Where a run begins: [`find_checkpoint`], once what a killed run left behind is put right.

    Args:
        resume (`str` or `bool`, *optional*), output_dir (`str` or `os.PathLike`): See [`find_checkpoint`].
        settings (`dict`): Of this run. A warning says where a checkpoint's differ.

    Raises:
        `FileNotFoundError` or `ValueError`: See [`find_checkpoint`].
        `FileExistsError`: A new run would mix its checkpoints with another's.
    """
    settle(output_dir)
    found = find_checkpoint(resume, output_dir)
    if found is None:
        there = checkpoints_in(output_dir)
        if there:
            told = _differing(there[-1], settings)
            raise ExistsError(
                f"{output_dir} holds {there[-1].name} of an earlier run{told and f' ({told})'}. Go on with "
                "that run (resume_from_checkpoint=True, or --resume_from_checkpoint), give another output_dir, or "
                "delete its checkpoints."
            )
    elif told := _differing(found, settings):
        logger.warning_once(f"{found} goes on with other settings than it was saved with: {told}.")
    return found


def _differing(checkpoint: Path, settings: dict[str, Any]) -> str:
    return differing((read_manifest(checkpoint) or {"settings": {}})["settings"], settings)


def differing(before: dict[str, Any], settings: dict[str, Any]) -> str:
    """In words, which of a run's settings are not as they were kept; empty if all are."""
    # As JSON gives them back.
    now = json.loads(json.dumps(settings))
    names = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} {before[name]} there, {now[name]} here" for name in names)


# -- names ------------------------------------------------------------------------------------------------------------


def settle(output_dir: str | os.PathLike) -> None:
    """Give checkpoints that were whole when their writer was killed their names, and delete what else it left."""
    aside = Path(output_dir) / ASIDE
    for part in checkpoints_in(aside):
        if _damage(part, read=True) is None:
            publish(part, Path(output_dir) / part.name)
    shutil.rmtree(aside, ignore_errors=True)


def publish(part: Path, folder: Path) -> None:
    """
    Give a whole checkpoint its name. One that has it already stays aside, for the caller to delete.

    Args:
        part (`Path`): Under `_saving/` beside `folder`, with its manifest.
        folder (`Path`): Its name.
    """
    if folder.exists():
        # Killed after this, [`settle`] finds `part` whole.
        os.replace(folder, part.with_name(f"replaced-{uuid.uuid4().hex}"))
    os.replace(part, folder)
    flush(folder.parent, inside=False)


def rotate(output_dir: str | os.PathLike, limit: int | None, kept: Collection[Path]) -> None:
    """
    Delete the checkpoints that were saved first, beyond `limit`. Broken ones neither count nor are touched.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        limit (`int`, *optional*): How many stay; all by default, or where it is not positive.
        kept (`Collection[Path]`): Those that stay anyway: the last, the best.
    """
    if limit is None or limit <= 0:
        return
    # By the time of saving: a run that went on from an earlier checkpoint may save lower steps than lie there.
    saved = {
        folder: (folder / MANIFEST).stat().st_mtime_ns
        for folder in checkpoints_in(output_dir)
        if read_manifest(folder) is not None
    }
    others = sorted((folder for folder in saved if folder not in kept), key=saved.get)
    aside = Path(output_dir) / ASIDE
    for folder in others[: max(len(saved) - limit, 0)]:
        aside.mkdir(exist_ok=True)
        # Gone by name before its files go, so that no half of it is ever found.
        os.replace(folder, aside / f"removed-{uuid.uuid4().hex}")
    shutil.rmtree(aside, ignore_errors=True)


# -- what is read back ------------------------------------------------------------------------------------------------


@contextmanager
def no_code(checkpoint: str | os.PathLike) -> Iterator[None]:
    """What `torch.load(weights_only=True)` refuses inside comes out as words."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{checkpoint} holds pickled objects, which could run code as they are read, where a checkpoint of this "
            "package holds tensors and numbers. Do not resume from it."
        ) from error


def load_state(checkpoint: str | os.PathLike, rank: int, world: int) -> dict[str, Any]:
    """
    What [`save_state`] wrote.

    Args:
        checkpoint (`str` or `os.PathLike`): The checkpoint.
        rank, world (`int`): This process, and how many there are.

    Raises:
        `ValueError`: Another number of processes saved it, or it is not what this version saves.
    """
    file = state_file(checkpoint, rank)
    saved = len(list(Path(checkpoint).glob("draft_opd_state_*.pt")))
    if saved != world or not file.is_file():
        raise InputError(
            f"{checkpoint} was saved by {saved} processes, and there are {world} now; each goes on with its own "
            f"texts. Launch as many, or start a new run from this drafter."
        )
    with no_code(checkpoint):
        state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise InputError(f"{file} does not hold what this version saves. Resume from another checkpoint.")
    return state


def save_state(checkpoint: str | os.PathLike, rank: int, state: dict[str, Any]) -> None:
    """Tensors and plain values of one process, in a folder that is made."""
    file = state_file(checkpoint, rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def state_file(checkpoint: str | os.PathLike, rank: int) -> Path:
    return Path(checkpoint) / f"draft_opd_state_{rank}.pt"
