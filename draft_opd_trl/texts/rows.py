"""Rows of prompts from files, folders and the Hub, or what is wrong with them: which file, which line, what to do.

What a prompt is, is not known here.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..core.checks import check_value, path
from ..core.errors import EnvironmentFault, InputError, NotFoundError
from ..core.limits import LIMITS
from ..folders.reach import why_not_on_hub


FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
# What `datasets` reads of a folder; and how many files a folder of data may have.
_DATA = {*FORMATS, ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zst", ".zip"}
MOST_FILES = 10_000
_MEND = "Mend it, or leave it out."


def load_prompts(name: str, config: str | None = None, split: str = "train") -> Dataset:
    """
    Prompts from the Hub (an id, or the folder of a downloaded one), a folder of `save_to_disk`, or a local file.

    Args:
        name (`str`): Id, folder, or a `.json`, `.jsonl` or `.parquet` file.
        config, split (`str`, *optional*): Where the data set has several.

    Raises:
        `FileNotFoundError`: No such file or data set, or no network to fetch it.
        `ValueError`: It holds no rows, or what is no row; or has no such configuration or split.
    """
    name = check_value("dataset_name", name, str, path)
    place = Path(name)
    if place.suffix in FORMATS:
        return _read_file(place)
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        return _read_saved(place, split)
    if place.is_dir():
        _check_folder(place)
    elif not place.exists():
        _ask_hub(name)
    try:
        dataset = load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        raise InputError(f"{name} holds rows that cannot be read ({_cause(error)}). Mend the file.") from error
    except OSError as error:
        raise _not_found(name, str(error)) from error
    except Exception as error:  # names of configurations and splits, scripts, formats: all of it is this data set
        raise InputError(
            f"{name!r} could not be loaded as configuration {config!r}, split {split!r} ({_cause(error)}). Name "
            "others, or give a local file."
        ) from error
    if not len(dataset):
        raise InputError(f"{name!r}, split {split!r}, holds no rows. Give one that does.")
    return dataset


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _cause(error: BaseException) -> str:
    """The first thing that went wrong, on one line: what wraps it says less."""
    error = _chain(error)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _not_found(name: str, why: str) -> NotFoundError:
    return NotFoundError(
        f"{name!r} is no data set here, and could not be fetched from the Hub ({' '.join(why.split())}). Without a "
        "network, give a local file or folder; `hf download --repo-type dataset ID --local-dir DIR` makes one "
        "elsewhere."
    )


def _ask_hub(name: str) -> None:
    kept = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
    why = None if kept.is_dir() else why_not_on_hub(name, "dataset")
    if why is not None:
        raise _not_found(name, why)


def _check_folder(folder: Path) -> None:
    """`datasets` looks through all there is below a folder, which may be a disk."""
    found = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise InputError(
            f"{folder} holds more than {MOST_FILES} files, so it is not taken for a data set. Give the data set's own "
            "folder, or a file of it."
        )
    if not any(file.suffix in _DATA for file in found):
        raise NotFoundError(f"{folder} is a folder without data files ({', '.join(sorted(_DATA))}). Give one with.")


def _read_saved(folder: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:
        raise InputError(
            f"{folder} looks like a folder of `save_to_disk`, but cannot be read ({_cause(error)}). Save it again."
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise InputError(f"{folder} has no split {split!r}. Name one of {', '.join(saved)}.")
        saved = saved[split]
    if not len(saved):
        raise InputError(f"{folder} holds no rows. Give a data set that does.")
    return saved


def _read_file(file: Path) -> Dataset:
    if not file.is_file():
        raise NotFoundError(f"{file} is not a file here. Give the path of a {', '.join(FORMATS)} file.")
    try:
        with file.open("rb") as handle:
            empty = not handle.read(1)
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be read ({error.strerror}). Give a file that can.") from error
    if empty:
        raise InputError(f'{file} is empty. Give a file with a row a line, such as {{"prompt": "…"}}.')
    if file.suffix != ".parquet":
        # First, as its reader takes several rows of a line, and dies of some files instead of raising.
        _check_utf8(file)
        if wrong := _what_is_wrong(file):
            raise InputError(wrong)
    try:
        dataset = load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")
    except Exception as error:
        if any(isinstance(one, OSError) for one in _chain(error)):
            raise  # the disk of the cache, and not the file
        if file.suffix == ".parquet":
            raise InputError(f"{file} is no Parquet file ({_cause(error)}). Give one that is.") from error
        raise InputError(f"{file} cannot be read as rows ({_cause(error)}). {_MEND}") from error
    if not len(dataset):
        raise InputError(f"{file} holds no rows. Give a file that does.")
    return dataset


def _check_utf8(file: Path) -> None:
    """`datasets` reads other encodings too, and gets other letters."""
    with file.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{file}, line {number} is not UTF-8 ({error.reason}). Save it as UTF-8.") from error


def _what_is_wrong(file: Path) -> str | None:
    """The first line that is no row. Of a `.json` file, which may be one list of rows, the first fault in that."""
    content = file.read_text(encoding="utf-8")
    if not content.strip():
        return f"{file} holds nothing but blanks. Give a file with a row a line."
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError) as error:
            return f"{file} is one JSON list with a fault ({error}). {_MEND}"
        wrong = (place for place, row in enumerate(rows) if not isinstance(row, dict))
        return next((_no_row(f"{file}, row {place + 1}", rows[place]) for place in wrong), None)
    # Not `splitlines`, which also splits inside a text that holds one of Unicode's other ends of lines.
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{file}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_unique) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            return f"{where} is not JSON ({getattr(error, 'msg', error)}): {line[:60]!r}. {_MEND}"
        if not isinstance(row, dict):
            return _no_row(where, row)
    return None


def _no_row(where: str, row: object) -> str:
    return f'{where} holds {row!r:.60}, and a row is a JSON object such as {{"prompt": "…"}}. {_MEND}'


def _unique(entries: list[tuple]) -> dict:
    row = dict(entries)
    if len(row) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return row


def hold_out(dataset: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """
    The data set without `count` rows drawn at random, and these rows; `None` where `count` is 0.

    Raises:
        `ValueError`: Nothing would be left, or it is no count.
    """
    count = check_value("num_eval_prompts", count, int, LIMITS["num_eval_prompts"])
    if count == 0:
        return dataset, None
    if len(dataset) <= count:
        raise InputError(
            f"Holding {count} prompts out for evaluation leaves nothing to train on: the data set has {len(dataset)} "
            "rows. Hold fewer out (--num_eval_prompts), or none (0)."
        )
    parts = dataset.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]
