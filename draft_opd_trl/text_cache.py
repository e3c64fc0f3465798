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

    A shard is written aside and moved into place whole, so whatever instant a writer is killed at, what can be read is
    whole. Writers never touch each other's shards, so any number of processes may share a folder. A text that two of
    them wrote at once is there twice, and each reader keeps to the first it saw.

    Args:
        folder (`str` or `os.PathLike`): Holds a sub-folder for each combination of settings.
        settings (`dict`): What decides the text beside the prompt, as JSON can hold it. Its hash names the sub-folder,
            and `settings.json` there says it in full.
    """

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]) -> None:
        written = json.dumps(settings, indent=2, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(written.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace_text(self.folder / "settings.json", written)
        _replace_text(self.folder / "dataset_info.json", json.dumps(asdict(DatasetInfo(features=FEATURES))))
        self._read: set[str] = set()
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
        rows = {
            key: {"key": key, "prompt_ids": prompt, "completion_ids": completion, "draw": draw}
            for prompt, completion in zip(prompts, completions, strict=True)
            if (key := _key(prompt, draw)) not in self._places
        }
        if not rows:
            return
        # Names sort by time, so that the earliest of equal texts is the first.
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.arrow"
        scratch = self.folder / f"{name}.tmp"
        with ArrowWriter(path=str(scratch), features=FEATURES) as writer:
            for row in rows.values():
                writer.write(row)
            writer.finalize()
        os.replace(scratch, self.folder / name)
        self._index_new_shards()
        self._describe()

    def _names(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.arrow"))

    def _index_new_shards(self) -> None:
        for name in self._names():
            if name not in self._read:
                for row, key in enumerate(self._shard(name)["key"]):
                    self._places.setdefault(key, (name, row))
                self._read.add(name)

    def _describe(self) -> None:
        """Keep `state.json`, the list of shards by which `datasets.load_from_disk` opens the folder."""
        listed: list[str] = []
        # Read again after writing: of several writers, the last to replace the file has listed every shard.
        while (names := self._names()) != listed:
            state = {"_data_files": [{"filename": name} for name in names], **_STATE}
            state["_fingerprint"] = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
            _replace_text(self.folder / "state.json", json.dumps(state, indent=2))
            listed = names


def _key(prompt: Sequence[int], draw: int) -> str:
    return hashlib.sha256(f"{draw}:{','.join(map(str, prompt))}".encode()).hexdigest()[:32]


def _replace_text(file: Path, text: str) -> None:
    scratch = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
