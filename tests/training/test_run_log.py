"""What is logged: ratios of sums, by hand and in whole runs, whatever the layout of a batch and the logging window."""

import math
from types import SimpleNamespace

import pytest
import torch
from runs import make_trainer, spelled_prompts, written_texts
from transformers import TrainerCallback

from draft_opd_trl import load_drafter
from draft_opd_trl.training import run_log
from draft_opd_trl.training.run_log import RunLog


@pytest.fixture(scope="module")
def texts(model):
    """Of unequal lengths."""
    return written_texts(model, spelled_prompts(12))


ALONE = SimpleNamespace(num_processes=1, device=torch.device("cpu"))


def test_a_window_is_a_ratio_of_sums_and_an_extreme_an_extreme():
    log = RunLog(ALONE)
    for part, whole, length in ((1, 1, 7), (9, 2, 3), (2, 5, 5)):
        log.add("acceptance/length", part, whole)
        log.add("loss/accepted", torch.tensor(float(part)), torch.tensor(float(whole)))
        log.add("completions/min_length", length, 4)
        log.add("completions/max_length", length, 4)
        log.add("replay/blocks", part)
        log.add("acceptance/slot_2", 0, 0)
        with log.stopwatch.measure("step"), log.stopwatch.measure("prepare"), log.stopwatch.measure("forward"):
            pass
        totals = log.end_step()
        assert totals["acceptance/length"] == (part, whole) and "acceptance/slot_2" not in totals
    figures = log.take()
    times = {name for name in figures if "time" in name}
    assert times == {"step_time", "time/forward", "time/backward"}
    assert {name: value for name, value in figures.items() if name not in times} == {
        "acceptance/length": 12 / 8,
        "loss/accepted": 12 / 8,
        "completions/min_length": 3,
        "completions/max_length": 7,
        "replay/blocks": 4,
    }
    assert log.take() == {}


def test_ranks_are_added_and_one_that_met_nothing_counts_nothing(monkeypatch):
    other = {"replay/blocks": (5.0, 0.5), "replay/error_share": (1, 4)}
    monkeypatch.setattr(run_log, "gather_object", lambda own: [*own, other])
    log = RunLog(SimpleNamespace(num_processes=2, device=torch.device("cpu")))
    log.add("replay/blocks", 3)
    log.add("completions/min_length", 4, 2)
    log.add("completions/min_length", 1, 0)
    log.end_step()
    assert log.take() == {"replay/blocks": 8, "completions/min_length": 4, "replay/error_share": 0.25}


RUN = {
    "rollout_source": "speculation",
    "rejected_weight": 0.5,
    "lmbda": 0.5,
    "replay_buffer_size": 64,
    "replay_ratio": 0.5,
    "optim": "sgd",
    "max_steps": 6,
    "shuffle_dataset": False,
}


def logs_of(trainer):
    """Of training steps, without what a clock says."""
    trainer.train()
    own = ("step", "epoch")
    return [
        {name: value for name, value in log.items() if "time" not in name and name not in own}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def test_no_figure_depends_on_the_layout_of_a_batch(drafter_folder, model, texts, tmp_path):
    layouts = {}
    for size, accumulated in ((4, 1), (2, 2), (1, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = make_trainer(drafter_folder, model, texts, tmp_path / str(size), **RUN, **options)
        layouts[size] = logs_of(trainer)
    for logs in layouts.values():
        for log, whole in zip(logs, layouts[4], strict=True):
            assert log == pytest.approx(whole, rel=2e-4, abs=1e-7)
            assert {"loss/rejected", "rollout/cached", "replay/buffer", "completions/clipped_ratio"} <= log.keys()
            assert log["loss"] == pytest.approx(log["loss/accepted"] + log["loss/rejected"])
    assert [log["rollout/cached"] for log in layouts[1]] == [0, 0, 0, 1, 1, 1]


def test_no_figure_depends_on_the_logging_window(drafter_folder, model, texts, tmp_path, monkeypatch):
    """Each of a longer window is the ratio of the sums, so it can be told from the steps' own parts and wholes."""
    totals, ended = [], RunLog.end_step
    monkeypatch.setattr(RunLog, "end_step", lambda log: totals.append(ended(log)) or totals[-1])
    options = {"per_device_train_batch_size": 4, "logging_steps": 3, **RUN}
    logs = logs_of(make_trainer(drafter_folder, model, texts, tmp_path, **options))
    assert len(logs) == 2 and len(totals) == 6
    for log, steps in zip(logs, (totals[:3], totals[3:]), strict=True):
        extremes = {"completions/min_length": min, "completions/max_length": max}
        names = {name for step in steps for name in step}
        for name in names - {"num_tokens"}:
            pairs = [step[name] for step in steps if name in step]
            expected = sum(part for part, _ in pairs) / sum(whole for _, whole in pairs)
            if name in extremes:
                expected = extremes[name](part for part, _ in pairs)
            assert log[name] == pytest.approx(expected), name
        assert log.keys() - names == {"loss", "grad_norm", "learning_rate"}
    assert logs[1]["num_tokens"] == sum(step["num_tokens"][0] for step in totals)


def test_acceptance_over_a_window_is_committed_over_verifications(drafter_folder, model, texts, tmp_path):
    """Of texts replayed by a drafter that does not move: what one replay of all of them says."""
    options = {"learning_rate": 0.0, "max_steps": 3, "shuffle_dataset": False, "num_anchors": 100}
    once = make_trainer(drafter_folder, model, texts, tmp_path / "a", per_device_train_batch_size=12, **options)
    apart = make_trainer(drafter_folder, model, texts, tmp_path / "b", logging_steps=3, **options)
    whole, window = logs_of(once)[0], logs_of(apart)[0]
    names = [name for name in whole if name.startswith(("acceptance/", "loss/"))]
    assert len(names) > 3
    assert {name: window[name] for name in names} == pytest.approx({name: whole[name] for name in names}, rel=1e-4)


class BreakAt(TrainerCallback):
    """Makes one weight NaN behind the optimizer's back, before the named step's forward pass."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(model.parameters()).data.view(-1)[0] = math.nan


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(drafter_folder, model, texts, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "rejected_weight": 0.5}
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, callbacks=[BreakAt(3)], **options)
    with pytest.raises(ValueError, match=r"loss/accepted is nan at step 3, with learning_rate 0.01"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("rate", [1e30, 1e38])
def test_weights_that_are_not_finite_are_never_saved(drafter_folder, model, texts, tmp_path, rate):
    options = {"max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 1}
    drafter = load_drafter(str(drafter_folder))
    optimizer = torch.optim.SGD(drafter.parameters(), lr=rate)
    trainer = make_trainer(drafter, model, texts, tmp_path, max_steps=6, optimizers=(optimizer, None), **options)
    with pytest.raises(ValueError, match=r"(A weight of the drafter|loss/accepted) is .* at step \d, with"):
        trainer.train()
    for folder in tmp_path.glob("checkpoint-*"):
        assert all(bool(w.isfinite().all()) for w in torch.load(folder / "optimizer.pt")["state"].values())
