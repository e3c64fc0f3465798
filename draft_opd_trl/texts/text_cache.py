"""Texts on disk: written once, read by every epoch, rank and run that asks for the same ones.

A cache is a folder of Parquet shards for one combination of settings (what wrote the texts, under which law), which
`datasets.load_dataset` opens as one data set. Knows no models, no sources: prompts and completions are token ids.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml
from datasets.utils import logging
from pyarrow import parquet

from ..core.files import atomic_file, write_atomically, writing


logger = logging.get_logger(__name__)

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "draw": pa.int32(),
    }
)


class TextCache:
    """
    Completions by prompt and draw, for one combination of settings.

    A shard is written aside, flushed and moved into place whole, so whatever instant a writer is killed at, what can
    be read is whole. A shard that cannot be read, for whatever reason, is passed over, and its texts are written
    again. Writers never touch each other's shards, so any number of processes may share a folder. A text that two of
    them wrote at once is there twice, and each reader keeps to the first it saw.

    Args:
        folder (`str` or `os.PathLike`): Holds a sub-folder for each combination of settings.
        settings (`dict`): What decides the text beside the prompt, as YAML can hold it. Its hash names the sub-folder,
            and `_settings.yaml` there says it in full.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
        # Where the words are the same, the folder is.
        written = yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)
        self.folder = Path(folder) / hashlib.sha256(written.encode()).hexdigest()[:16]
        with writing(self.folder):
            # No reader of Parquet folders takes such a name for data.
            write_atomically(self.folder / "_settings.yaml", written)
        self._read: set[str] = set()
        self._unreadable: set[str] = set()
        self._forgotten: dict[str, tuple[str, int]] = {}
        self._places: dict[str, tuple[str, int]] = {}
        # Texts of a batch stand in one shard.
        self._completions = lru_cache(maxsize=32)(lambda name: self._column(name, "completion_ids"))
        self._index_new_shards()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, prompts: Sequence[Sequence[int]], draw: int = 0) -> list[list[int] | None]:
        """The completion of each prompt, or `None` where there is none; also what others wrote meanwhile."""
        keys = [_key(prompt, draw) for prompt in prompts]
        if any(key not in self._places for key in keys):
            self._index_new_shards()
        places = [self._places.get(key) for key in keys]
        return [None if place is None else self._completions(place[0])[place[1]].as_py() for place in places]

    def add(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], draw: int = 0) -> None:
        """Write the texts that are not there yet, as one shard."""
        keys = [_key(prompt, draw) for prompt in prompts]
        # What was forgotten is on disk, and is this very text.
        self._places.update({key: self._forgotten.pop(key) for key in keys if key in self._forgotten})
        new = {
            key: {"key": key, "prompt_ids": list(prompt), "completion_ids": list(completion), "draw": draw}
            for key, prompt, completion in zip(keys, prompts, completions, strict=True)
            if key not in self._places
        }
        if not new:
            return
        # Names sort by time, so that the earliest of equal texts is the first.
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
        file = self.folder / name
        with writing(file, "What was there before is whole."), atomic_file(file) as part:
            parquet.write_table(pa.Table.from_pylist(list(new.values()), SCHEMA), part, write_page_checksum=True)
        self._index_new_shards()

    def last_shard(self) -> str:
        """Name of the shard written last, by whomever; empty where there is none."""
        return max(self._names(), default="")

    def forget_after(self, name: str) -> None:
        """Texts that came after a shard ([`last_shard`]) count as missing, each until it is added again."""
        self._index_new_shards()
        self._forgotten = {key: place for key, place in self._places.items() if place[0] > name}
        self._places = {key: place for key, place in self._places.items() if key not in self._forgotten}

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.parquet") if path.name not in self._unreadable)

    def _column(self, name: str, column: str) -> pa.ChunkedArray:
        return parquet.read_table(self.folder / name, columns=[column], page_checksum_verification=True)[column]

    def _index_new_shards(self) -> None:
        for name in self._names():
            if name in self._read:
                continue
            try:
                keys = self._column(name, "key").to_pylist()
            except (pa.ArrowException, OSError, KeyError) as error:
                told = " ".join(str(error).split())[:200]
                logger.warning(
                    f"{self.folder / name} cannot be read ({told}) and is passed over; its texts are written again. "
                    "It may be deleted."
                )
                self._unreadable.add(name)
                continue
            for place, key in enumerate(keys):
                if key not in self._forgotten:
                    self._places.setdefault(key, (name, place))
            self._read.add(name)


def _key(prompt: Sequence[int], draw: int) -> str:
    return hashlib.sha256(f"{draw}:{','.join(map(str, prompt))}".encode()).hexdigest()[:32]
