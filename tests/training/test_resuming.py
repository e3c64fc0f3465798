"""Runs that are killed, stopped or out of disk: what is saved is whole, and what goes on is the very same run."""

import gc
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ANY_KIND, tiny_drafter, tiny_stopping_model
from hostile_folders import RunsCode
from peft import LoraConfig
from runs import make_trainer, written_texts
from transformers import TrainerCallback

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer
from draft_opd_trl.cli import CommandParser
from draft_opd_trl.commands import evaluate as evaluate_command
from draft_opd_trl.commands import train as command
from draft_opd_trl.core.errors import EnvironmentFault, ExistsError, InputError, Interrupted, NotFoundError
from draft_opd_trl.core.target import Target
from draft_opd_trl.folders.run_state import (
    ASIDE,
    MANIFEST,
    checkpoints_in,
    fault_of,
    newest_whole_checkpoint,
    write_manifest,
)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """The Trainer collects garbage when it starts, among all that the libraries hold: longer than these runs take."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A target, the folder of a drafter, and texts."""
    model = tiny_stopping_model()
    folder = tmp_path_factory.mktemp("drafter")
    tiny_drafter(ANY_KIND, Target(model)).save_pretrained(folder)
    prompts = [[5 + row, *range(6, 8 + row % 3)] for row in range(16)]
    return model, str(folder), written_texts(model, prompts)


def build(world, output_dir, callbacks=(), **options):
    model, drafter, texts = world
    saved = {"save_strategy": "steps", "save_steps": 1, "replay_buffer_size": 8, "replay_ratio": 0.5}
    trainer = make_trainer(
        drafter, model, texts, output_dir, callbacks=list(callbacks), **{"max_steps": 3, **saved, **options}
    )
    trainer._before_training = lambda: None  # the memory plan takes longer than the runs
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The uninterrupted run: its folder and weights."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(world, folder)
    trainer.train()
    return folder, weights(trainer)


@pytest.fixture(scope="module")
def other(world, tmp_path_factory):
    """A run whose checkpoints are others of the same names."""
    folder = tmp_path_factory.mktemp("other")
    build(world, folder, learning_rate=5e-2, max_steps=2).train()
    return folder


def in_child(function):
    """How a forked process ends that runs `function`: its exit code, or minus the signal that killed it."""
    if (child := os.fork()) == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(call, folder):
    """Kill this process at the n-th thing it does to the disk in `folder`: half done, done or about to be."""
    left = call

    def count():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, arguments):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (changes or writes) and str(folder) in str(arguments[0]):
            count()

    sync, save = os.fsync, torch.save

    def dying_sync(handle):
        count()
        sync(handle)

    def dying_save(value, file, *rest, **options):
        save(value, file, *rest, **options)
        if left == 1:
            os.truncate(file, os.path.getsize(file) // 2)
        count()

    os.fsync, torch.save = dying_sync, dying_save
    sys.addaudithook(watch)
    return lambda: call - left


def start_from(folder, output_dir, *names):
    output_dir.mkdir()
    for name in names:
        shutil.copytree(folder / name, output_dir / name)


def contents_of(checkpoint):
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return [files[name] for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "draft_opd_state_0.pt")]


@pytest.mark.parametrize("overwritten", [False, True], ids=["new", "overwritten"])
def test_killed_at_every_step_of_a_save_it_resumes_to_the_same_bits(world, whole, other, tmp_path, overwritten):
    """A run that goes on from step 1 dies inside the save of step 2, where there may be one of that name already."""
    folder, wanted = whole
    trainer = build(world, tmp_path / "none", save_total_limit=2)

    def save_second(output_dir, call):
        trainer.args.output_dir = str(output_dir)
        save = trainer._save_checkpoint

        def save_and_die(*arguments):
            counted = die_at(call, output_dir)
            save(*arguments)
            (tmp_path / "steps").write_text(str(counted()))
            os._exit(0)

        trainer._save_checkpoint = save_and_die
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))

    def finish(output_dir):
        trainer.args.output_dir = str(output_dir)
        found = newest_whole_checkpoint(output_dir)
        if found.name == "checkpoint-2" and overwritten:
            # It is the one run's or the other's, and never both.
            contents = [contents_of(parent / "checkpoint-2") for parent in (folder, other)]
            assert contents_of(found) in contents
            if contents_of(found) == contents[1]:
                found = found.with_name("checkpoint-1")
        trainer.train(resume_from_checkpoint=str(found) if overwritten else True)
        assert_same(weights(trainer), wanted)
        assert [path.name for path in checkpoints_in(output_dir)] == ["checkpoint-2", "checkpoint-3"]
        assert not (output_dir / ASIDE).exists()

    call, ended = 0, None
    while ended != 0:
        call += 1
        output_dir = tmp_path / str(call)
        start_from(folder, output_dir, "checkpoint-1")
        if overwritten:
            shutil.copytree(other / "checkpoint-2", output_dir / "checkpoint-2")
        ended = in_child(partial(save_second, output_dir, call))
        assert ended in (0, -signal.SIGKILL)
        assert in_child(partial(finish, output_dir)) == 0, call
        shutil.rmtree(output_dir)
    assert call > 30  # every file, its flush, the manifest, the names, what is deleted


def test_one_broken_by_older_saving_is_passed_over(world, whole, tmp_path):
    """Half overwritten, as older versions left them: old and new state mixed."""
    folder, wanted = whole
    start_from(folder, tmp_path / "run", "checkpoint-1", "checkpoint-2")
    shutil.copy(folder / "checkpoint-1" / "optimizer.pt", tmp_path / "run" / "checkpoint-2")
    trainer = build(world, tmp_path / "run", resume_from_checkpoint="true")
    trainer.train()
    assert_same(weights(trainer), wanted)
    with pytest.raises(InputError, match="holds another optimizer.pt than was saved"):
        start_from(folder, tmp_path / "again", "checkpoint-2")
        (tmp_path / "again" / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
        build(world, tmp_path / "again").train(str(tmp_path / "again" / "checkpoint-2"))


def test_a_new_run_in_the_folder_of_another_says_so(world, whole, tmp_path):
    start_from(whole[0], tmp_path / "run", "checkpoint-2")
    trainer = build(world, tmp_path / "run", learning_rate=5e-3)
    with pytest.raises(ExistsError, match=r"holds checkpoint-2 of an earlier run \(learning_rate 0.01 there, 0.005"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ExistsError):
        build(world, tmp_path / "run", resume_from_checkpoint="true").train(resume_from_checkpoint=False)


@pytest.mark.parametrize("save_total_limit", [1, 2])
def test_the_best_one_stays_and_is_found_by_its_name(world, tmp_path, monkeypatch, save_total_limit):
    lengths = iter([1.0, 3.0, 2.0, 1.0])

    def evaluate(self, *rest, **more):
        metrics = {"eval_acceptance_length": next(lengths)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(DraftOPDTrainer, "evaluate", evaluate)
    trainer = build(
        world,
        tmp_path,
        max_steps=4,
        eval_dataset=world[2].select_columns(["prompt_ids"]).select([0]),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="acceptance_length",
        greater_is_better=True,
        save_total_limit=save_total_limit,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    names = ["checkpoint-2", "checkpoint-4"] if save_total_limit == 2 else ["checkpoint-2"]
    assert [path.name for path in checkpoints_in(tmp_path)] == names
    for path in checkpoints_in(tmp_path):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2") and fault_of(path) is None


def test_weights_alone_are_whole_but_nothing_to_go_on_from(world, tmp_path):
    build(world, tmp_path, save_only_model=True, max_steps=1).train()
    with pytest.raises(NotFoundError, match="checkpoint-1 was saved with save_only_model=True"):
        build(world, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_an_adapter_resumes_to_the_same_bits(world, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    run = build(world, tmp_path / "whole", peft_config=lora)
    run.train()
    start_from(tmp_path / "whole", tmp_path / "cut", "checkpoint-1")
    resumed = build(world, tmp_path / "cut", peft_config=lora)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(run), weights(resumed))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_written_after_the_checkpoint_change_nothing(world, tmp_path, temperature):
    """The killed run left later texts on disk; they come with the states that verification kept all the same."""
    options = {
        "rollout_source": "speculation",
        "temperature": temperature,
        "rejected_weight": 1.0,
        "replay_buffer_size": 0,
        "replay_ratio": 0.0,
        "max_steps": 6,
        "regenerate_every": 2,
        "lmbda": 1.0,
    }
    run = build(world, tmp_path, **options)
    run.train()
    wanted = weights(run)
    for path in checkpoints_in(tmp_path)[1:]:
        shutil.rmtree(path)
    shards = sorted(tmp_path.glob("_text_cache/*/*.parquet"))
    resumed = build(world, tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), wanted)
    # A text is on disk once, and known once it has been written again.
    assert sorted(tmp_path.glob("_text_cache/*/*.parquet")) == shards
    assert len(resumed.source.cache) == 16


def test_states_that_were_kept_are_read_again_to_the_same_bits(world, tmp_path):
    """A store in memory is gone with the run, and rows of its batches may meet others when they are read anew."""
    options = {"replay_buffer_size": 0, "replay_ratio": 0.0, "max_steps": 6, "optim": "sgd"}
    kept = {**options, "state_store_gib": 0.01}
    run, plain = build(world, tmp_path / "whole", **kept), build(world, tmp_path / "plain", **options)
    run.train()
    plain.train()
    shares = [log["replay/states_kept"] for log in run.state.log_history if "replay/states_kept" in log]
    assert shares == [0, 0, 0, 0, 1, 1]
    for mine, without in zip(weights(run).values(), weights(plain).values(), strict=True):
        torch.testing.assert_close(mine, without, rtol=1e-4, atol=1e-6)
    start_from(tmp_path / "whole", tmp_path / "cut", "checkpoint-3")
    resumed = build(world, tmp_path / "cut", **kept)
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(run), weights(resumed))


# -- signals ----------------------------------------------------------------------------------------------------------


class SignalAt(TrainerCallback):
    """Sends this process a signal before a step, and then again at another."""

    def __init__(self, number, *steps):
        self.number, self.steps = number, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(world, whole, tmp_path, capfd, number):
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    trainer = build(world, tmp_path, [SignalAt(number, 1)], save_strategy="no")
    with pytest.raises(Interrupted, match="at step 2 of 3, with a checkpoint in .* Go on with") as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number and "\n" not in str(stopped.value)
    assert capfd.readouterr().err.count(f"{signal.Signals(number).name}: stopping at the end of this step") == 1
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    resumed = build(world, tmp_path, save_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert_same(weights(resumed), whole[1])


def test_a_second_signal_stops_at_once(world, tmp_path):
    class Impatient(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer = build(world, tmp_path, [Impatient()], gradient_accumulation_steps=2, max_steps=2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert not isinstance(stopped.value, Interrupted) and not checkpoints_in(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3000, 20000, 60000])
def test_a_full_disk_costs_nothing_that_was_saved(world, whole, tmp_path, size):
    """Files may be no longer than `size`, so one after another fails: states, weights, optimizer."""
    folder, wanted = whole
    start_from(folder, tmp_path / "run", "checkpoint-1")
    trainer = build(world, tmp_path / "run")

    def fill():
        save = trainer._save_checkpoint

        def save_on_full_disk(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            save(*arguments)

        trainer._save_checkpoint = save_on_full_disk
        with pytest.raises(
            EnvironmentFault, match=r"checkpoint-2 could not be written \(.*Earlier checkpoints are"
        ) as told:
            trainer.train(resume_from_checkpoint=True)
        assert "\n" not in str(told.value)

    assert in_child(fill) == 0
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / ASIDE).exists()
    trainer.train(resume_from_checkpoint=True)
    assert_same(weights(trainer), wanted)


# -- strangers --------------------------------------------------------------------------------------------------------


PICKLES = "draft_opd_state_0.pt optimizer.pt scheduler.pt rng_state.pth scaler.pt training_args.bin pytorch_model.bin"


@pytest.mark.parametrize("name", PICKLES.split())
def test_a_strangers_checkpoint_runs_nothing(world, whole, tmp_path, name):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(whole[0] / "checkpoint-2", folder)
    torch.save({"state": RunsCode(tmp_path / "ran")}, folder / name)
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    write_manifest(folder, 2, {})
    trainer = build(world, tmp_path / "out")
    if name == "scaler.pt":  # read where there is one, which CPUs lack
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(InputError, match="could run code"):
            trainer._load_scaler(str(folder))
    elif name == "training_args.bin":  # not read
        trainer.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(InputError, match="could run code"):
            trainer.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "ran").exists()


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--resume_from_checkpoint"], "true"),
        (["--resume-from-checkpoint", "--seed", "1"], "true"),
        (["--resume_from_checkpoint=false"], "false"),
        (["--resume_from_checkpoint", "out/checkpoint-3"], "out/checkpoint-3"),
    ],
)
def test_the_option_stands_alone_or_with_a_value(tmp_path, words, value):
    needed = ["--model", "d", "--teacher", "t", "--dataset_name", "p", "--output_dir", str(tmp_path)]
    _, _, _, config, _ = CommandParser("train", command).parse([*needed, *words])
    assert config.resume_from_checkpoint == value


def arguments_of(world, tmp_path, **options):
    _, drafter, texts = world
    texts.to_json(tmp_path / "texts.jsonl")
    arguments = command.TrainArguments(drafter, "target", str(tmp_path / "texts.jsonl"), num_eval_prompts=2)
    config = DraftOPDConfig(str(tmp_path / "out"), report_to="none", **options)
    return arguments, command.QuantizationArguments(), command.AdapterArguments(), config


@pytest.mark.parametrize(
    ("resume", "error"), [("true", NotFoundError), ("out/checkpoint-7", NotFoundError), (None, ExistsError)]
)
def test_the_command_finds_out_before_anything_else(world, tmp_path, monkeypatch, resume, error):
    monkeypatch.setattr("draft_opd_trl.training.trainer.DraftOPDTrainer", None)
    if resume is None:
        (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(error):
        command.run(*arguments_of(world, tmp_path, resume_from_checkpoint=resume))


def test_the_evaluation_before_training_is_not_repeated(world, tmp_path, monkeypatch):
    evaluated = []

    def build_trainer(model, teacher, config, train_dataset, eval_dataset, **more):
        trainer = build(world, config.output_dir, eval_dataset=eval_dataset, max_steps=2)
        evaluate = trainer.evaluate

        def counted():
            evaluated.append(trainer.state.global_step)
            return evaluate()

        trainer.evaluate = counted
        return trainer

    monkeypatch.setattr("draft_opd_trl.training.trainer.DraftOPDTrainer", build_trainer)
    first = command.run(*arguments_of(world, tmp_path))
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    second = command.run(*arguments_of(world, tmp_path, resume_from_checkpoint="true"))
    assert evaluated == [0, 2, 2]
    for name in ("acceptance_length", "interval", "verifications"):
        assert second["before"][name] == first["before"][name]
        assert second["after"][name] == first["after"][name]
    assert second["difference"] == first["difference"] and "change of τ, paired" in command.show(second)


def test_an_interrupted_evaluation_says_how_to_go_on(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_command, "_measured", interrupt)
    for folder, told in (
        ("results", "is in results. The same command goes on"),
        (None, "nothing was kept. With --output_dir"),
    ):
        arguments = evaluate_command.EvaluateArguments(["pocket"], "drafter", "target", output_dir=folder)
        with pytest.raises(KeyboardInterrupt, match=told):
            evaluate_command.run(arguments, command.QuantizationArguments())


def test_every_file_of_a_checkpoint_is_in_its_manifest(whole):
    folder = whole[0] / "checkpoint-3"
    listed = json.loads((folder / MANIFEST).read_text())
    found = {path.name for path in Path(folder).iterdir()} - {MANIFEST}
    assert set(listed["files"]) == found and listed["step"] == 3
    assert "chat_template_kwargs" not in listed["settings"]
