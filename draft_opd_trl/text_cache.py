"""Texts on disk: written once, read by every epoch, rank and run that asks for the same ones.

A cache is a folder of Arrow shards for one combination of settings (what wrote the texts, and under which law), which
`datasets.load_from_disk` opens as one data set. Knows no models and no sources: prompts and completions are token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from datasets.utils import logging
from pyarrow import ArrowException

from .files import atomic_file, write_atomically, writing


logger = logging.get_logger(__name__)

FEATURES = Features(
    {
        "key": Value("string"),
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "draw": Value("int32"),
    }
)
# What `Dataset.save_to_disk` writes into state.json beside the list of files.
_STATE = {
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}


class TextCache:
    """
    Completions by prompt and draw, for one combination of settings.

    A shard is written aside, flushed and moved into place whole, so whatever instant a writer is killed at, what can
    be read is whole. A shard that cannot be read, for whatever reason, is passed over, and its texts are written
    again. Writers never touch each other's shards, so any number of processes may share a folder. A text that two of
    them wrote at once is there twice, and each reader keeps to the first it saw.

    Args:
        folder (`str` or `os.PathLike`): Holds a sub-folder for each combination of settings.
        settings (`dict`): What decides the text beside the prompt, as JSON can hold it. Its hash names the sub-folder,
            and `settings.json` there says it in full.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
        written = json.dumps(settings, indent=2, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(written.encode()).hexdigest()[:16]
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "settings.json", written)
            write_atomically(self.folder / "dataset_info.json", json.dumps(asdict(DatasetInfo(features=FEATURES))))
        self._read: set[str] = set()
        self._unreadable: set[str] = set()
        self._forgotten: dict[str, tuple[str, int]] = {}
        self._places: dict[str, tuple[str, int]] = {}
        # A mapped file holds a file descriptor, so only some stay open.
        self._shard = lru_cache(maxsize=32)(lambda name: Dataset.from_file(str(self.folder / name)))
        self._index_new_shards()
        self._describe()  # a writer that was killed may have left its last shard out

    def __len__(self) -> int:
        return len(self._places)

    def find(self, prompts: Sequence[Sequence[int]], draw: int = 0) -> list[list[int] | None]:
        """The completion of each prompt, or `None` where there is none; also what others wrote meanwhile."""
        keys = [_key(prompt, draw) for prompt in prompts]
        if any(key not in self._places for key in keys):
            self._index_new_shards()
        places = [self._places.get(key) for key in keys]
        return [None if place is None else self._shard(place[0])[place[1]]["completion_ids"] for place in places]

    def add(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], draw: int = 0) -> None:
        """Write the texts that are not there yet, as one shard."""
        keys = [_key(prompt, draw) for prompt in prompts]
        # What was forgotten is on disk, and is this very text.
        self._places.update({key: self._forgotten.pop(key) for key in keys if key in self._forgotten})
        rows = {
            key: {"key": key, "prompt_ids": prompt, "completion_ids": completion, "draw": draw}
            for key, prompt, completion in zip(keys, prompts, completions, strict=True)
            if key not in self._places
        }
        if not rows:
            return
        # Names sort by time, so that the earliest of equal texts is the first.
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.arrow"
        file = self.folder / name
        with writing(file, "What was there before is whole."), atomic_file(file) as part:
            with ArrowWriter(path=str(part), features=FEATURES) as writer:
                for row in rows.values():
                    writer.write(row)
                writer.finalize()
        self._index_new_shards()
        self._describe()

    def last_shard(self) -> str:
        """Name of the shard written last, by whomever; empty where there is none."""
        return max(self._names(), default="")

    def forget_after(self, name: str) -> None:
        """Texts that came after a shard ([`last_shard`]) count as missing, each until it is added again."""
        self._index_new_shards()
        self._forgotten = {key: place for key, place in self._places.items() if place[0] > name}
        self._places = {key: place for key, place in self._places.items() if key not in self._forgotten}

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.arrow") if path.name not in self._unreadable)

    def _index_new_shards(self) -> None:
        for name in self._names():
            if name in self._read:
                continue
            try:
                keys = self._shard(name)["key"][:]
            except (ArrowException, OSError, KeyError) as error:
                told = " ".join(str(error).split())[:200]
                logger.warning(
                    f"{self.folder / name} cannot be read ({told}) and is passed over; its texts are written again. "
                    "It may be deleted."
                )
                self._unreadable.add(name)
                continue
            for row, key in enumerate(keys):
                if key not in self._forgotten:
                    self._places.setdefault(key, (name, row))
            self._read.add(name)

    def _describe(self) -> None:
        """Keep `state.json`, the list of shards by which `datasets.load_from_disk` opens the folder."""
        listed: list[str] = []
        # Read again after writing: of several writers, the last to replace the file has listed every shard.
        while (names := self._names()) != listed:
            state = {"_data_files": [{"filename": name} for name in names], **_STATE}
            state["_fingerprint"] = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
            with writing(self.folder):
                write_atomically(self.folder / "state.json", json.dumps(state, indent=2))
            listed = names


def _key(prompt: Sequence[int], draw: int) -> str:
    return hashlib.sha256(f"{draw}:{','.join(map(str, prompt))}".encode()).hexdigest()[:32]
