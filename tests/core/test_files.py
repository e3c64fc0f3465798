"""Files and folders that are there whole or not at all, and what is said when the machine refuses."""

import os

import pytest

from draft_opd_trl.core.errors import EnvironmentFault, ExistsError
from draft_opd_trl.core.files import (
    atomic_file,
    atomic_folder,
    check_new_folder,
    check_writable,
    write_atomically,
    writing,
)


class Stopped(Exception):
    pass


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    file = tmp_path / "new" / "file.txt"
    write_atomically(file, "old, é")
    with pytest.raises(Stopped), atomic_file(file) as part:
        part.write_text("half")
        assert part.parent == file.parent and file.read_text("utf-8") == "old, é"
        raise Stopped
    assert file.read_text("utf-8") == "old, é"
    with atomic_file(file) as part:
        part.write_text("new")
    assert file.read_text() == "new" and os.listdir(file.parent) == ["file.txt"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "a" / "b"
    with pytest.raises(Stopped), atomic_folder(folder) as part:
        (part / "one").touch()
        raise Stopped
    assert not folder.exists() and os.listdir(tmp_path / "a") == []
    with atomic_folder(folder) as part:
        (part / "one").touch()
        assert not folder.exists()
    assert os.listdir(folder) == ["one"] and os.listdir(tmp_path / "a") == ["b"]


def test_a_folder_that_is_taken_is_not_overwritten(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious").touch()
    with pytest.raises(OSError), atomic_folder(tmp_path / "taken") as part:
        (part / "one").touch()
    assert os.listdir(tmp_path / "taken") == ["precious"] and os.listdir(tmp_path) == ["taken"]


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "not" / "there" / "yet")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written to"):
        check_writable(tmp_path / "file" / "below")


def test_a_new_folder_may_be_there_if_nothing_is_in_it(tmp_path):
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    check_new_folder(tmp_path / "not" / "there")
    for taken in (tmp_path, tmp_path / "empty" / "file"):
        (tmp_path / "empty" / "file").touch()
        with pytest.raises(ExistsError, match=f"{taken} is there already and not empty"):
            check_new_folder(taken)
    with pytest.raises(EnvironmentFault, match="cannot be written to"):
        check_new_folder(tmp_path / "empty" / "file" / "below")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "a/b"),
        PermissionError(13, "Permission denied"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_what_the_machine_refuses_is_one_line_with_the_path(error):
    with pytest.raises(EnvironmentFault, match=r"^out/checkpoint-3 could not be written \(.*\). All else is whole.$"):
        with writing("out/checkpoint-3", "All else is whole."):
            raise error


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x"), RuntimeError("a bug"), KeyError("x")])
def test_a_bug_is_not_dressed_up(error):
    with pytest.raises(type(error)) as raised, writing("out"):
        raise error
    assert raised.value is error
