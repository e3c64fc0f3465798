"""Files and folders that appear whole or not at all, whatever instant the process or the machine stops at.

What is written aside is flushed to the disk before it takes its name, and the name before anybody relies on it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from .errors import EnvironmentFault, ExistsError, UserError


# What a machine refuses, and what to do about it. Other errors of the system come from names that we made up.
REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk (--output_dir).",
    errno.EDQUOT: "Free some of your quota, or write to another disk (--output_dir).",
    errno.EFBIG: "The file system takes no file of that size: write to another one (--output_dir).",
    errno.EACCES: "Change the permissions, or give another path.",
    errno.EPERM: "Change the permissions, or give another path.",
    errno.EROFS: "It is read-only: give a path that can be written to.",
    errno.EIO: "The disk fails: give a path on another one.",
    errno.ESTALE: "The network disk went away: mount it again.",
    errno.ENOTDIR: "A part of the path is a file: give another path.",
    errno.EISDIR: "It is a folder, and a file is needed: give another path.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.EMFILE: "Too many files are open: raise `ulimit -n`.",
    errno.ENOMEM: "Free some memory, or lower the batch sizes.",
}


def refusal_of(error: BaseException) -> int | None:
    """The system's number of what the machine refused, if `error` says so: the system's own, or a library's."""
    number = error.errno if isinstance(error, OSError) else None
    # Rust's libraries (safetensors, tokenizers) say the number in their text.
    if number is None and (said := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(said[1])
    return number if number in REMEDIES else None


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(folder: str | os.PathLike, inside: bool = True) -> None:
    """Wait until a file, or a folder's list of names and, unless `inside` is `False`, all in it, is on the disk."""
    for path in Path(folder).rglob("*") if inside else ():
        _flush(path)
    _flush(Path(folder))


@contextmanager
def writing(place: str | os.PathLike, kept: str = "Free some space, or write to another disk.") -> Iterator[None]:
    """
    What the machine refuses inside, directly or to a library, comes out as one line.

    Args:
        place (`str` or `os.PathLike`): What is written.
        kept (`str`, *optional*): What a failure does not cost, and what to do, as sentences.

    Raises:
        `OSError`: The disk is full, read-only, gone, or belongs to another.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = refusal_of(error)
        if number is not None:
            reason = os.strerror(number)
        # torch says no number.
        elif isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|iostream error", str(error)):
            reason = "a file could not be written to its end"
        else:
            raise
        where = getattr(error, "filename", None)
        reason += f": {where}" if where and str(where) != str(place) else ""
        raise EnvironmentFault(f"{place} could not be written ({reason}). {kept}") from error


def check_writable(folder: str | os.PathLike) -> None:
    """
    Raises:
        `OSError`: Nothing can be written into `folder`, which need not be there yet. To be known before the work is
            done.
    """
    folder = Path(folder)
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise EnvironmentFault(
            f"{folder} cannot be written to ({place}: {error.strerror}). Give a folder on a disk that can, or change "
            "its permissions."
        ) from error


def check_new_folder(folder: str | os.PathLike) -> None:
    """
    Raises:
        `FileExistsError`: `folder` is there and not empty.
        `OSError`: It cannot be made. To be known before the work is done.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExistsError(f"{folder} is there already and not empty. Give a new folder.")
    check_writable(folder)


@contextmanager
def _appearing(place: Path) -> Iterator[Path]:
    """A path beside `place`, which takes its name at the end, on the disk as a whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        flush(part)
        os.replace(part, place)
        _flush(place.parent)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_file(file: str | os.PathLike) -> Iterator[Path]:
    """
    A path to write to, which becomes `file` at the end. After an error nothing is left, and `file` is as it was.

    Args:
        file (`str` or `os.PathLike`): Its folder is made.
    """
    with _appearing(Path(file)) as part:
        yield part


def write_atomically(file: str | os.PathLike, text: str) -> None:
    """The whole file, in UTF-8, or none of it."""
    with atomic_file(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """
    A new folder to fill, which becomes `folder` at the end. After an error nothing is left.

    Args:
        folder (`str` or `os.PathLike`): Not there yet, or empty.
    """
    with _appearing(Path(folder)) as part:
        part.mkdir()
        yield part
