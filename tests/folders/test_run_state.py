"""Checkpoints as folders: whole ones are found, others are passed over, and names come last."""

import json
import os
import pickle

import pytest
import torch
from hostile_folders import RunsCode

from draft_opd_trl.core.errors import ExistsError, InputError, NotFoundError
from draft_opd_trl.folders.run_state import (
    ASIDE,
    MANIFEST,
    checkpoints_in,
    fault_of,
    find_checkpoint,
    first_checkpoint,
    load_state,
    newest_whole_checkpoint,
    publish,
    rotate,
    save_state,
    settle,
    write_manifest,
)


SETTINGS = {"learning_rate": 0.5, "max_steps": 9}


def save(folder, step, content="x"):
    """A checkpoint as far as this room looks."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"{content}{step}")
    history = [{"step": 0, "epoch": 0, "eval_acceptance_length": 2.5}, {"step": step, "loss": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    (folder / "rng_state.pth").write_text("r")
    (folder / "deep").mkdir()
    (folder / "deep" / "scheduler.pt").write_text("s")
    write_manifest(folder, step, SETTINGS)
    return folder


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 2, 9 and 10, and things that only look like one."""
    for step in (2, 9, 10):
        save(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    return tmp_path


def truncate(folder):
    (folder / "model.safetensors").write_text("")


def mix(folder):
    """Of the same size, from another step."""
    (folder / "model.safetensors").write_bytes(b"y10")


def lose(folder):
    (folder / "deep" / "scheduler.pt").unlink()


def unfinished(folder):
    (folder / MANIFEST).unlink()


def half_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:-20])


def odd_manifest(folder):
    (folder / MANIFEST).write_text('{"step": 1, "settings": {}, "files": {"a": 3}}')


def deep_manifest(folder):
    (folder / MANIFEST).write_text("[" * 100000)


def weights_only(folder):
    (folder / "rng_state.pth").unlink()
    write_manifest(folder, 10, SETTINGS)


DAMAGES = (truncate, mix, lose, unfinished, half_manifest, odd_manifest, deep_manifest, weights_only)


def test_the_newest_is_the_one_of_the_highest_step(run):
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert newest_whole_checkpoint(run) == find_checkpoint(True, run) == run / "checkpoint-10"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_one_is_passed_over_and_named(run, damage, monkeypatch):
    told = []
    monkeypatch.setattr("draft_opd_trl.folders.run_state.logger.warning", told.append)
    damage(run / "checkpoint-10")
    assert find_checkpoint(True, run) == run / "checkpoint-9"
    assert len(told) == 1 and "checkpoint-10: it " in told[0] and "\n" not in told[0]
    with pytest.raises(InputError, match="checkpoint-10.*Give another checkpoint"):
        find_checkpoint(str(run / "checkpoint-10"), run)


def test_a_manifest_opens_nothing_outside_its_folder(run):
    manifest = json.loads((run / "checkpoint-10" / MANIFEST).read_text())
    for name in ("/dev/zero", "../checkpoint-9/model.safetensors"):
        (run / "checkpoint-10" / MANIFEST).write_text(json.dumps({**manifest, "files": {name: [0, "0"]}}))
        assert fault_of(run / "checkpoint-10") == f"lacks {name}"


@pytest.mark.parametrize(
    ("resume", "name"),
    [(None, None), (False, None), ("False", None), ("true", "checkpoint-10"), ("checkpoint-2", "checkpoint-2")],
)
def test_what_can_be_asked_for(run, monkeypatch, resume, name):
    monkeypatch.chdir(run)
    found = find_checkpoint(resume, run)
    assert (found and found.name) == name


def test_nothing_to_go_on_from_says_so(run, tmp_path_factory):
    with pytest.raises(NotFoundError, match="holds no whole checkpoint. Give"):
        find_checkpoint(True, tmp_path_factory.mktemp("new"))
    with pytest.raises(NotFoundError, match="'gone', which is no folder here"):
        find_checkpoint("gone", run)
    for folder in checkpoints_in(run):
        lose(folder)
    with pytest.raises(NotFoundError, match="no whole checkpoint; checkpoint-2 lacks deep/scheduler.pt; checkpoint-9"):
        find_checkpoint("true", run)


def test_a_new_run_does_not_mix_with_another(run):
    with pytest.raises(ExistsError, match="holds checkpoint-10 of an earlier run. Go on"):
        first_checkpoint(None, run, SETTINGS)
    with pytest.raises(ExistsError, match=r"earlier run \(learning_rate 0.5 there, 0.25 here\)"):
        first_checkpoint(False, run, {**SETTINGS, "learning_rate": 0.25})
    unfinished(run / "checkpoint-10")
    with pytest.raises(ExistsError, match="holds checkpoint-10 of an earlier run"):
        first_checkpoint(None, run, SETTINGS)
    assert first_checkpoint(None, run / "new", SETTINGS) is None


def test_going_on_with_other_settings_is_said(run, monkeypatch):
    told = []
    monkeypatch.setattr("draft_opd_trl.folders.run_state.logger.warning", told.append)
    first_checkpoint(True, run, SETTINGS)
    assert told == []
    first_checkpoint(True, run, {**SETTINGS, "max_steps": 20})
    assert len(told) == 1 and "max_steps 9 there, 20 here" in told[0]


def test_what_a_killed_run_left_is_put_right(run):
    """A whole one had only its name to get; half of one goes; so does what was being deleted."""
    old = (run / "checkpoint-9").stat().st_ino
    new = save(run / ASIDE / "checkpoint-9", 9, "new")
    save(run / ASIDE / "checkpoint-11", 11)
    unfinished(save(run / ASIDE / "checkpoint-12", 12))
    save(run / ASIDE / "removed-1", 1)
    inode = new.stat().st_ino
    settle(run)
    assert (run / "checkpoint-9").stat().st_ino == inode != old
    names = [path.name for path in checkpoints_in(run)]
    assert names == ["checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-11"]
    assert not (run / ASIDE).exists()
    assert all(fault_of(path) is None for path in checkpoints_in(run))


def test_a_name_that_is_taken_is_taken_over_whole(run):
    publish(save(run / ASIDE / "checkpoint-10", 10, "new"), run / "checkpoint-10")
    assert (run / "checkpoint-10" / "model.safetensors").read_text() == "new10"
    assert fault_of(run / "checkpoint-10") is None
    settle(run)
    assert len(checkpoints_in(run)) == 3 and not (run / ASIDE).exists()


def test_rotation_counts_whole_ones_by_the_time_they_were_saved(run):
    for age, step in enumerate((9, 10, 2)):  # a run that went on from an earlier checkpoint saved step 2 last
        os.utime(run / f"checkpoint-{step}" / MANIFEST, (age + 1, age + 1))
    unfinished(save(run / "checkpoint-8", 8))
    for limit in (None, 0, 3):
        rotate(run, limit, {run / "checkpoint-2"})
        assert len(checkpoints_in(run)) == 4
    rotate(run, 2, {run / "checkpoint-2"})
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-2", "checkpoint-8", "checkpoint-10"]
    rotate(run, 1, {run / "checkpoint-2", run / "checkpoint-10"})
    assert len(checkpoints_in(run)) == 3
    assert not (run / ASIDE).exists()


def test_state_is_tensors_and_plain_values(tmp_path):
    state = {"feed": {"rollouts": [{"tokens": torch.arange(3)}]}, "error_buffer": {"entries": [{"losses": {1: None}}]}}
    save_state(tmp_path, 0, state)
    loaded = load_state(tmp_path, 0, 1)
    assert torch.equal(loaded["feed"]["rollouts"][0]["tokens"], torch.arange(3))
    assert loaded["error_buffer"] == state["error_buffer"]
    with pytest.raises(InputError, match="was saved by 1 processes, and there are 2 now"):
        load_state(tmp_path, 1, 2)


@pytest.mark.parametrize("dump", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))])
def test_pickled_objects_are_not_read(tmp_path, dump):
    dump({"feed": RunsCode(tmp_path / "run")}, tmp_path / "draft_opd_state_0.pt")
    with pytest.raises(InputError, match="could run code"):
        load_state(tmp_path, 0, 1)
    assert not (tmp_path / "run").exists()
