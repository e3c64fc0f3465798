"""What a run shows beyond scalars: printed traces, and what trackers receive; with the real trackers that are here."""

import sys
from types import SimpleNamespace

import pytest
from conftest import ANY_KIND, tiny_drafter
from datasets import Dataset
from runs import make_trainer
from transformers import TrainerControl, TrainerState

from draft_opd_trl.core.target import Target
from draft_opd_trl.evaluation.traces import trace_texts
from draft_opd_trl.evaluation.viewer import marked_text
from draft_opd_trl.texts.server_source import SERVED
from draft_opd_trl.training import callbacks
from draft_opd_trl.training.callbacks import AcceptanceProgressCallback, TraceCallback, log_line, slot_shares


STEPS = 2


def build(kind, model, tmp_path, report_to, **options):
    prompts = Dataset.from_dict({"prompt_ids": [[5 + i, 9, 12] for i in range(8)]})
    options |= {"report_to": report_to, "project": "draft-opd-tests", "rollout_source": "speculation"}
    return make_trainer(
        tiny_drafter(kind, Target(model)),
        model,
        prompts,
        tmp_path,
        eval_dataset=prompts,
        max_steps=STEPS,
        max_completion_length=16,
        **options,
    )


def logged_slots(trainer):
    """By step of training, then of evaluation."""
    logs = trainer.state.log_history
    return [list(slot_shares(log).values())[0] for log in logs if slot_shares(log)]


def test_slots_of_a_log_are_gathered_by_prefix():
    logs = {"loss": 1.0, "acceptance/length": 2.0, "acceptance/slot_1": 0.5, "acceptance/slot_2": 0.25}
    logs |= {f"eval_code_acceptance_slot_{k}": k / 16 for k in range(1, 13)}
    assert slot_shares(logs) == {
        "acceptance/by_slot": [0.5, 0.25],
        "eval_code_acceptance_by_slot": [k / 16 for k in range(1, 13)],
    }


def test_a_line_has_six_figures_in_their_order():
    logs = {"grad_norm": 0.5, "learning_rate": 3e-4, "loss": 1.23456, "acceptance/length": 3.5, "epoch": 0.1}
    logs |= {"acceptance/slot_1": 0.84, "acceptance/slot_2": 0.5, "step_time": 1.925, "tokens_per_second": 812.4}
    line = "loss 1.235, τ 3.500, first proposal 84.0%, lr 3.00e-04, 1.93 s/step, 812 tokens/s"
    assert log_line(logs) == line
    # SFT replays nothing.
    assert log_line({"loss": 1.0, "learning_rate": 0.0}) == "loss 1, lr 0.00e+00"


def test_an_evaluation_is_tau_with_its_interval_and_its_change():
    def tau(prefix, value):
        return {f"{prefix}{end}": value + more for end, more in [("", 0), ("_low", -0.25), ("_high", 0.5)]}

    logs = {**tau("eval_acceptance_length", 3.0), "eval_acceptance_length_per_prompt": 9.0, "eval_runtime": 2.0}
    assert log_line(logs) == "eval: τ 3.000 [2.750, 3.500]"
    logs |= tau("eval_acceptance_length_change", 0.125)
    assert log_line(logs) == "eval: τ 3.000 [2.750, 3.500], change +0.125 [-0.125, +0.625]"
    assert log_line({"train_runtime": 3.0, "train_loss": 1.0}) is None


def test_a_run_shows_a_line_a_log_and_no_box_is_torn(model, tmp_path, capsys):
    """Bars are on stderr, lines and boxes on stdout: beside a box no bar stands on the screen."""
    shown = {"log_completions": True, "disable_tqdm": False}
    trainer = build(ANY_KIND, model, tmp_path, "none", gradient_accumulation_steps=2, **shown)
    standing = []
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, AcceptanceProgressCallback))
    wrapped = callbacks.print_traces

    def print_traces(traces):
        # A bar that is taken away is written over with blanks.
        standing.append(capsys.readouterr().err.rsplit("\r", 2)[-2:])
        wrapped(traces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "print_traces", print_traces)
        trainer.train()
    assert callback.training_bar is None and len(standing) == STEPS
    assert all(not "".join(ends).strip() for ends in standing), standing


def test_the_bar_shows_what_a_server_came_to():
    figures = {"own": None, "served": None}
    callback = AcceptanceProgressCallback(lambda: figures["own"], lambda: figures["served"])
    state, control, shown = TrainerState(max_steps=9), TrainerControl(), []
    callback.on_train_begin(SimpleNamespace(), state, control)
    callback.training_bar.set_postfix_str = lambda text, refresh: shown.append(text)
    for own, served in [(None, None), (2.0, None), (2.0, 1.5)]:
        figures.update(own=own, served=served)
        callback.on_step_end(SimpleNamespace(), state, control)
    callback.on_train_end(SimpleNamespace(), state, control)
    assert shown == ["τ 2.00", "τ 2.00, served τ 1.50"]
    assert log_line({"loss": 1.0, "acceptance/length": 2.0, SERVED: 1.5}) == "loss 1, τ 2.000, served τ 1.500"


def test_tokens_a_second_are_those_of_the_window():
    callback, written = AcceptanceProgressCallback(lambda: 2.0), []
    args, control = SimpleNamespace(), TrainerControl()
    state = TrainerState(max_steps=20, global_step=4, num_input_tokens_seen=1000)  # of a run that goes on
    callback.on_train_begin(args, state, control)
    callback.training_bar.write = written.append
    for step, tokens in [(6, 1400), (7, 2000)]:
        state.global_step, state.num_input_tokens_seen = step, tokens
        callback.on_log(args, state, control, {"loss": 1.0, "step_time": 2.0})
    callback.on_log(args, state, control, {"train_runtime": 1.0})
    callback.on_train_end(args, state, control)
    assert written == [
        "step 6/20: loss 1, 2.00 s/step, 100 tokens/s",
        "step 7/20: loss 1, 2.00 s/step, 300 tokens/s",
    ]


def test_examples_are_the_first_texts_in_use_as_the_drafter_stands(kind, model, tmp_path, capsys):
    trainer = build(kind, model, tmp_path, "none", log_completions=True, num_completions_to_print=3)
    assert trainer.example_traces() == []
    trainer.train()
    traces = trainer.example_traces()
    texts = trainer.feed.rollouts[0]
    trainer.drafter.eval()
    texts.blocks = None
    assert traces == trace_texts(trainer.target, trainer.drafter, texts, trainer.processing_class)[:3]
    printed = capsys.readouterr().out
    # Once a step, and not again when training ends or an evaluation logs.
    assert [printed.count(f"step {step}: τ") for step in (1, 2)] == [3, 3]
    trainer.evaluate()
    assert "τ" not in capsys.readouterr().out


def test_nothing_is_printed_unless_asked(kind, model, tmp_path, capsys):
    build(kind, model, tmp_path, "none").train()
    assert "τ" not in capsys.readouterr().out


def test_only_the_first_process_shows_but_every_one_computes(capsys):
    called = []
    callback = TraceCallback(lambda: called.append(True) or [], [])
    args = SimpleNamespace(log_completions=True, report_to=["wandb", "trackio"])
    callback.on_log(args, TrainerState(is_world_process_zero=False), TrainerControl(), {"loss": 1.0})
    assert called == [True] and capsys.readouterr().out == ""


def test_tensorboard_receives_histograms_and_traces(kind, model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build(kind, model, tmp_path, "tensorboard", log_completions=True)
    trainer.train()
    trainer.evaluate()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0, "tensors": 0})
    events.Reload()
    shown = [*events.Histograms("train/acceptance/by_slot"), *events.Histograms("eval/acceptance_by_slot")]
    assert [event.step for event in shown] == [1, 2, 2]
    assert [event.histogram_value.bucket for event in shown] == logged_slots(trainer)
    assert [event.histogram_value.bucket_limit for event in shown] == [[1.5, 2.5, 3.5, 4.5]] * 3
    texts = events.Tensors("traces/1/text_summary")
    assert [event.step for event in texts] == [1, 2]
    written = texts[-1].tensor_proto.string_val[0].decode()
    assert marked_text(trainer.example_traces()[1]).plain.replace("\n", "\n    ") in written


class FakeTracker:
    """Keeps what is logged through wandb's interface."""

    run = "there"

    def __init__(self, name):
        self.__name__, self.logged = name, []

    def Histogram(self, np_histogram):  # noqa: N802
        return np_histogram

    def Table(self, dataframe):  # noqa: N802
        return dataframe

    def log(self, record):
        self.logged.append(record)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_with_tables_receive_both(name, model, tmp_path, monkeypatch):
    tracker = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer = build(ANY_KIND, model, tmp_path, "none", log_completions=True)
    trainer.args.report_to = [name]
    trainer.train()
    trainer.evaluate()
    assert [record["train/global_step"] for record in tracker.logged] == [1, 2, 2]
    names = ["train/acceptance/by_slot", "train/acceptance/by_slot", "eval/acceptance_by_slot"]
    for record, key, slots in zip(tracker.logged, names, logged_slots(trainer), strict=True):
        heights, edges = record[key]
        assert heights.tolist() == slots and edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert ["traces" in record for record in tracker.logged] == [True, True, False]
    table, traces = tracker.logged[1]["traces"], trainer.example_traces()
    assert list(table.columns) == ["step", "prompt", "completion", "acceptance_length", "trace"]
    assert table["trace"].tolist() == [marked_text(trace).plain for trace in traces]
    assert table["completion"].tolist() == [trace.completion for trace in traces]
    tracker.run = None
    count = len(tracker.logged)
    trainer.evaluate()
    assert len(tracker.logged) == count + (name == "trackio")


def test_the_real_trackio_takes_them(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is optional, and no development requirement")
    log, logged = trackio.log, []
    monkeypatch.setattr(trackio, "log", lambda record: logged.append(record) or log(record))
    trainer = build(ANY_KIND, model, tmp_path, "trackio", log_completions=True)
    trainer.train()
    records = [record for record in logged if "traces" in record]
    assert [record["train/global_step"] for record in records] == [1, 2]
    assert records[1]["traces"].data[0]["trace"] == marked_text(trainer.example_traces()[0]).plain
    assert list(records[1]["train/acceptance/by_slot"].histogram) == logged_slots(trainer)[1]
    assert "eval_acceptance_length" in trainer.evaluate()


def test_the_real_wandb_takes_them(model, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is optional, and no development requirement")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = build(ANY_KIND, model, tmp_path, "wandb", log_completions=True)
    trainer.train()
    trainer.evaluate()
    summary = wandb.run.summary
    assert summary["train/acceptance/by_slot"]["values"] == pytest.approx(logged_slots(trainer)[1])
    assert summary["eval/acceptance_by_slot"]["values"] == pytest.approx(logged_slots(trainer)[2])
    assert (summary["traces"]["ncols"], summary["traces"]["nrows"]) == (5, 2)
    wandb.finish()
