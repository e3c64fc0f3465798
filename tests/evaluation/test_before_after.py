"""Before and after training: paired by prompt, over a resume too, in results, card and one TensorBoard run."""

import json
import shutil

import pytest
import torch
from by_hand import AFTER, BEFORE
from conftest import save_target
from datasets import Dataset
from readers import checked
from runs import make_trainer, spelled_prompts

from draft_opd_trl.cli import main
from draft_opd_trl.decoding.acceptance import bootstrap_interval
from draft_opd_trl.evaluation.before_after import BeforeAfter, results_of, write_results
from draft_opd_trl.evaluation.best_k import advised


PROMPTS = [[1, 2], [3]]
CARD = "README.md"


@pytest.fixture(scope="module")
def prompts():
    return Dataset.from_dict({"prompt_ids": spelled_prompts(12)})


def noted(*evaluations):
    measured = BeforeAfter()
    for prompts, report, step in evaluations:
        measured.note("eval", prompts, report, step)
    return measured


def test_the_change_is_paired_by_prompt_and_of_the_same_prompts_only():
    change = noted((PROMPTS, BEFORE, 0), (PROMPTS, AFTER, 5)).change("eval")
    low, high = bootstrap_interval(AFTER, BEFORE)
    assert change == {"mean": pytest.approx(2.0 - 8 / 7), "low": low, "high": high}
    assert noted((PROMPTS, BEFORE, 0)).change("eval") is None
    assert noted((PROMPTS, AFTER, 5)).change("eval") is None
    assert noted((PROMPTS, BEFORE, 0), ([[1, 2], [4]], AFTER, 5)).change("eval") is None


def test_what_was_measured_before_survives_a_checkpoint(tmp_path):
    torch.save(noted((PROMPTS, BEFORE, 0)).state_dict(), tmp_path / "state.pt")
    resumed = BeforeAfter()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    resumed.note("eval", PROMPTS, AFTER, 5)
    assert resumed.change("eval") == noted((PROMPTS, BEFORE, 0), (PROMPTS, AFTER, 5)).change("eval")


def test_results_say_what_was_measured_and_no_more(tmp_path):
    both = noted((PROMPTS, BEFORE, 0), (PROMPTS, AFTER, 5))
    write_results(results_of(both, "eval", ("mine", "trained"), "temperature 0"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[when]["drafter"] for when in ("before", "after")] == ["mine", "trained"]
    assert results["after"]["acceptance_length"] == 2.0 and results["difference"] == both.change("eval")
    assert results["definition"].startswith("τ: ") and results["prompts"] == 2
    table = (tmp_path / "results.md").read_text()
    assert "| | mine | trained |" in table and "| change of τ, paired |  | +0.857 [" in table
    first = noted((PROMPTS, BEFORE, 0)).last["eval"]
    three = results_of(both, "eval", ("SFT", "Draft-OPD"), "temperature 0", ("new", first))
    assert three["start"]["drafter"] == "new" and "| | new | SFT | Draft-OPD |" in three["table"]
    assert three["gains"]["Draft-OPD − new"] == three["gains"]["Draft-OPD − SFT"] == three["difference"]
    assert three["gains"]["SFT − new"]["mean"] == 0
    others = noted(([[1, 2], [4]], BEFORE, 0)).last["eval"]
    assert "gains" not in results_of(both, "eval", ("SFT", "Draft-OPD"), "temperature 0", ("new", others))
    later = results_of(noted((PROMPTS, AFTER, 5)), "eval", ("mine", "trained"), "temperature 0")
    assert later["before"] is None and later["difference"] is None and "mine" not in later["table"]


def test_the_card_tells_of_every_evaluation_of_the_weights_beside_it(drafter_folder, model, prompts, tmp_path):
    """Whether they were evaluated before they were saved, or after."""
    from huggingface_hub import ModelCard

    def card(folder):
        return checked(ModelCard.load(folder / CARD))

    options = {"eval_dataset": prompts, "rollout_source": "speculation", "max_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(drafter_folder, model, prompts, tmp_path / "a", **options)
    before = trainer.evaluate()
    trainer.train()
    assert "There was no evaluation after training." in card(tmp_path / "a").text  # a checkpoint's
    after = trainer.evaluate()
    assert trainer.state.log_history[-1]["step"] == 2
    trainer.save_model()
    saved = card(tmp_path / "a").text
    assert "| | before training | after step 2 |" in saved and "There was no evaluation" not in saved
    tau = "eval_acceptance_length"
    ends = [[metrics[tau + end] for end in ("", "_low", "_high")] for metrics in (before, after)]
    assert "| **τ** | " + " | ".join("**{:.3f}** [{:.3f}, {:.3f}]".format(*one) for one in ends) + " |" in saved
    change = [after[f"{tau}_change{end}"] for end in ("", "_low", "_high")]
    assert change[0] == pytest.approx(ends[1][0] - ends[0][0])
    assert "| change of τ, paired | | {:+.3f} [{:+.3f}, {:+.3f}] |".format(*change) in saved

    trainer.save_model(str(tmp_path / "b"))
    trainer.evaluate({"more": prompts.select(range(4))})
    assert "more prompts: 4." in card(tmp_path / "b").text and "more" not in card(tmp_path / "a").text
    # Other weights than those saved say nothing about them.
    trainer.state.global_step = 3
    trainer.evaluate({"later": prompts.select(range(4))})
    assert "later prompts" not in card(tmp_path / "b").text


def test_best_weights_that_were_loaded_are_evaluated_as_those_of_their_step(drafter_folder, model, prompts, tmp_path):
    options = {"eval_dataset": prompts, "rollout_source": "speculation", "max_steps": 3, "learning_rate": 0.0}
    options |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "acceptance_length",
    }  # all equal: the first is best
    trainer = make_trainer(drafter_folder, model, prompts, tmp_path, **options, **best)
    trainer.train()
    assert (trainer.state.global_step, trainer.weights_step) == (3, 1)
    metrics = trainer.evaluate()
    log = trainer.state.log_history[-1]
    assert log["step"] == 1 and log["eval_acceptance_length"] == metrics["eval_acceptance_length"]


def test_tensorboard_shows_before_and_after_in_one_run(drafter_folder, model, prompts, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"eval_dataset": prompts, "rollout_source": "speculation", "max_steps": 2}
    trainer = make_trainer(drafter_folder, model, prompts, tmp_path / "out", **options, report_to="tensorboard")
    for act in (trainer.evaluate, trainer.train, trainer.evaluate):
        act()
    assert list((tmp_path / "here").iterdir()) == []
    (run,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/acceptance_length")] == [0, 2]
    assert [event.step for event in events.Scalars("train/acceptance/length")] == [1, 2]


def train(folder, *more):
    """`draft-opd train` on what lies in `folder`."""
    words = ["train", "--model", folder / "drafter", "--teacher", folder / "target"]
    words += ["--dataset_name", folder / "prompts.jsonl", "--output_dir", folder / "trained", "--report_to", "none"]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 4, "--max_completion_length", 16, "--use_cpu", "true"]
    words += ["--save_strategy", "steps", "--save_steps", 1, "--disable_tqdm", "true", *more]
    return main([str(word) for word in words])


@pytest.fixture
def folder(drafter_folder, model, prompts, tmp_path):
    shutil.copytree(drafter_folder, tmp_path / "drafter")
    save_target(model, tmp_path / "target")
    prompts.to_json(tmp_path / "prompts.jsonl")
    return tmp_path


def test_the_command_ends_with_the_paired_table_and_keeps_it(folder, capsys):
    assert train(folder, "--num_eval_prompts", 4, "--serve_batch_sizes", 1, 3) == 0
    printed, out = capsys.readouterr().out, folder / "trained"
    table = (out / "results.md").read_text()
    assert "| | drafter | trained |" in table and "| change of τ, paired |" in table
    assert table.strip() in printed and "4 held-out prompts, temperature 0" in printed
    first = json.loads((out / "results.json").read_text())
    assert [one["batch_size"] for one in first["serving"]] == [1, 3]
    assert f"to serve with: {advised(first['serving'])}\n" in printed
    assert all(f"| to serve with at batch {size} | " in (out / CARD).read_text() for size in (1, 3))
    assert "| | before training | after step 2 |" in (out / CARD).read_text()
    # Resumed before the end, it compares with what the run measured before its first step, and decodes that no more.
    shutil.rmtree(out / "checkpoint-2")
    (out / "results.json").unlink()
    assert train(folder, "--num_eval_prompts", 4, "--resume_from_checkpoint", out / "checkpoint-1") == 0
    again = json.loads((out / "results.json").read_text())
    assert again["before"] == first["before"]  # its seconds included
    assert again["difference"] == first["difference"]
    assert "| | before training | after step 2 |" in (out / CARD).read_text()


def test_without_held_out_prompts_nothing_is_claimed(folder, capsys):
    assert train(folder, "--num_eval_prompts", 0) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"drafter written to {folder / 'trained'}\n") and "τ" not in printed
    assert not list((folder / "trained").glob("results.*"))
    assert "It was not evaluated in the run that trained it." in (folder / "trained" / CARD).read_text()
