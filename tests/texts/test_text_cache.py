"""The text cache: what is written is read, by anyone, whatever instant a writer was killed at."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import load_dataset
from pyarrow import parquet

from draft_opd_trl.core.errors import EnvironmentFault
from draft_opd_trl.texts.text_cache import TextCache


SETTINGS = {"target": "t", "temperature": 0.0}


def rows_in(folder):
    """All that is on disk, in the order it was written."""
    return [row for shard in sorted(Path(folder).glob("*.parquet")) for row in parquet.read_table(shard).to_pylist()]


def test_what_is_written_is_read(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    assert cache.find([[1, 2], [3]]) == [None, None]
    cache.add([[1, 2], [3]], [[4, 5, 6], [7]])
    cache.add([[8]], [[9]])
    for reader in (cache, TextCache(tmp_path, dict(reversed(SETTINGS.items())))):
        assert reader.find([[3], [1, 2], [2, 1], [8]]) == [[7], [4, 5, 6], None, [9]]
        assert len(reader) == 3


def test_other_settings_and_other_draws_are_other_texts(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    cache.add([[1]], [[2]], draw=0)
    cache.add([[1]], [[3]], draw=1)
    assert cache.find([[1]], 0) + cache.find([[1]], 1) + cache.find([[1]], 2) == [[2], [3], None]
    assert TextCache(tmp_path, SETTINGS | {"temperature": 0.5}).find([[1]]) == [None]


def test_a_text_that_is_there_is_not_written_again(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    cache.add([[1]], [[2]])
    cache.add([[1], [3], [3]], [[9], [4], [4]])
    assert cache.find([[1], [3]]) == [[2], [4]]
    assert Counter(row["key"] for row in rows_in(cache.folder)).most_common(1)[0][1] == 1


def test_what_others_write_is_seen(tmp_path):
    first, second = TextCache(tmp_path, SETTINGS), TextCache(tmp_path, SETTINGS)
    first.add([[1]], [[2]])
    assert second.find([[1]]) == [[2]]
    # Both wrote it: everyone who comes later reads the earlier one.
    first.add([[5]], [[6]])
    second._places.clear()
    second.add([[5]], [[7]])
    assert TextCache(tmp_path, SETTINGS).find([[5]]) == [[6]]


@pytest.mark.parametrize("size", [0, 100, -8])
def test_a_shard_that_cannot_be_read_is_passed_over_and_written_again(tmp_path, monkeypatch, size):
    told = []
    monkeypatch.setattr("draft_opd_trl.texts.text_cache.logger.warning", told.append)
    cache = TextCache(tmp_path, SETTINGS)
    for number in range(3):
        cache.add([[number]], [[number] * 200])
    broken = sorted(cache.folder.glob("*.parquet"))[1]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2 if size < 0 else size])
    again = TextCache(tmp_path, SETTINGS)
    assert again.find([[0], [1], [2]]) == [[0] * 200, None, [2] * 200]
    assert len(told) == 1 and str(broken) in told[0] and "written again" in told[0]
    again.add([[1]], [[1] * 200])
    assert again.find([[1]]) == [[1] * 200]
    assert len(list(again.folder.glob("*.parquet"))) == 4


def test_what_is_forgotten_is_written_once_more_and_kept_once(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    assert cache.last_shard() == ""
    cache.add([[1]], [[2]])
    last = cache.last_shard()
    cache.add([[3]], [[4]])
    again = TextCache(tmp_path, SETTINGS)
    again.forget_after(last)
    assert again.find([[1], [3]]) == [[2], None]
    again.add([[3]], [[4]])
    assert again.find([[1], [3]]) == [[2], [4]]
    assert len(rows_in(cache.folder)) == 2
    again.forget_after("")
    assert again.find([[1], [3]]) == [None, None]


def test_a_full_disk_is_one_line_and_leaves_nothing_half(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    cache.add([[1]], [[2]])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with pytest.raises(EnvironmentFault, match=r"\.parquet could not be written \(File too large"):
            cache.add([[3]], [[4] * 2000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path for path in cache.folder.iterdir() if path.name.endswith(".part")] == []
    assert TextCache(tmp_path, SETTINGS).find([[1], [3]]) == [[2], None]


def test_shards_are_flushed_before_they_take_their_name(tmp_path, monkeypatch):
    cache = TextCache(tmp_path, SETTINGS)
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("sync") or sync(handle))
    monkeypatch.setattr(os, "replace", lambda one, other: done.append(Path(other).suffix) or replace(one, other))
    cache.add([[1]], [[2]])
    assert done == ["sync", ".parquet", "sync"]


def test_datasets_opens_the_folder(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    cache.add([[1, 2]], [[3, 4]])
    cache.add([[5]], [[6]], draw=2)
    rows = (
        load_dataset(str(cache.folder), split="train", cache_dir=str(tmp_path / "hub")).remove_columns("key").to_list()
    )
    assert rows == [
        {"prompt_ids": [1, 2], "completion_ids": [3, 4], "draw": 0},
        {"prompt_ids": [5], "completion_ids": [6], "draw": 2},
    ]
    assert parquet.read_table(cache.folder).num_rows == 2
    assert "target: t" in (cache.folder / "_settings.yaml").read_text()


def test_more_shards_than_are_kept(tmp_path):
    cache = TextCache(tmp_path, SETTINGS)
    for number in range(40):
        cache.add([[number]], [[number, number]])
    wanted = [[number] for number in range(40)]
    assert TextCache(tmp_path, SETTINGS).find(wanted) == [[number, number] for number in range(40)]


# Writes what is missing of `count` texts from `start` on, and says so after each.
WRITER = """
import sys
from draft_opd_trl.texts.text_cache import TextCache
folder, start, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
cache = TextCache(folder, {"target": "t", "temperature": 0.0})
print("ready", flush=True)
for number in range(start, start + count):
    if cache.find([[number]]) == [None]:
        cache.add([[number]], [[number] * 200])
        print(number, flush=True)
"""


def start_writer(folder, start, count):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(folder), str(start), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def check_whole(folder, count):
    cache = TextCache(folder, SETTINGS)
    assert cache.find([[number] for number in range(count)]) == [[number] * 200 for number in range(count)]
    keys = [row["key"] for row in rows_in(cache.folder)]
    assert len(keys) == len(set(keys)) == count


def test_killed_at_random_it_loses_nothing(tmp_path):
    draws, said, count = random.Random(0), [], 200
    for _ in range(2):
        writer = start_writer(tmp_path, 0, count)
        assert writer.stdout.readline() == "ready\n"
        said += [int(writer.stdout.readline()) for _ in range(draws.randint(1, 60))]
        time.sleep(draws.uniform(0, 0.005))
        writer.send_signal(signal.SIGKILL)
        said += [int(number) for number in writer.communicate()[0].split()]
        texts = TextCache(tmp_path, SETTINGS).find([[number] for number in said])
        assert texts == [[number] * 200 for number in said]
    assert 0 < len(said) < count, "the kills came too late or too early to mean anything"
    writer = start_writer(tmp_path, 0, count)
    writer.communicate()
    assert writer.returncode == 0
    check_whole(tmp_path, count)


# Kills a forked writer right before and right after each call that changes what is on disk, and looks at what is left.
CRASHES = """
import os, signal, sys
from pyarrow import parquet
from draft_opd_trl.texts import text_cache

SETTINGS = {"target": "t", "temperature": 0.0}

def crash(step, before):
    left = step
    def deadly(function):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    os.replace = deadly(os.replace)
    os.fsync = deadly(os.fsync)
    parquet.write_table = deadly(parquet.write_table)
    cache = text_cache.TextCache(sys.argv[1], SETTINGS)
    for number in range(100):
        if cache.find([[number]]) == [None]:
            cache.add([[number]], [[number] * 200])
            os.write(said, bytes([number]))

acknowledged = b""
for step in range(1, 13):
    for before in (True, False):
        heard, said = os.pipe()
        if (child := os.fork()) == 0:
            crash(step, before)
        os.close(said)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        acknowledged += os.read(heard, 100)
        os.close(heard)
        cache = text_cache.TextCache(sys.argv[1], SETTINGS)
        count = len(cache)
        assert count >= len(acknowledged)
        assert cache.find([[number] for number in range(count)]) == [[number] * 200 for number in range(count)]
        if count:
            keys = parquet.read_table(cache.folder)["key"].to_pylist()
            assert len(keys) == len(set(keys)) == count
print(count, len(acknowledged))
"""


def test_killed_at_any_step_of_writing_it_loses_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CRASHES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    count, acknowledged = map(int, done.stdout.split())
    # Some died between the shard and saying so: the text is there, and nobody was told.
    assert 0 < acknowledged < count


def test_several_writers_at_once(tmp_path):
    writers = [start_writer(tmp_path, start, 20) for start in (0, 20, 40)]
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    check_whole(tmp_path, 60)
