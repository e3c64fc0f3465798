"""Evaluation by a trainer: it is real speculative decoding, and leaves the run as it was."""

import pytest
import torch
from conftest import ANY_KIND, STOPS, tiny_drafter
from runs import make_trainer, parameters_of, spelled_prompts, written_texts
from transformers import EarlyStoppingCallback, TrainerCallback

from draft_opd_trl import SpeculationSettings, measure_acceptance, speculate
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.acceptance import AcceptanceReport
from draft_opd_trl.evaluation import round_costs


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


def test_evaluate_is_real_speculative_decoding(drafter_folder, model, texts, tmp_path):
    held_out = texts.select_columns(["prompt_ids"])
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, eval_dataset=held_out)
    metrics = trainer.evaluate()
    settings = SpeculationSettings(20, STOPS, batch_size=1)
    rollout = speculate(trainer.target, trainer.drafter, texts["prompt_ids"], settings)
    expected = float((rollout.completion_lengths - 1).sum()) / len(rollout.blocks)
    assert metrics["eval_acceptance_length"] == pytest.approx(expected)
    first = rollout.blocks.num_accepted[rollout.blocks.num_valid >= 1] >= 1
    assert metrics["eval_acceptance_slot_1"] == pytest.approx(float(first.float().mean()))
    assert metrics["eval_prompts"] == 16
    assert metrics["eval_tokens_per_second"] > 0
    # All of it is what measuring outside of training says, but for the time it took.
    report = measure_acceptance(trainer.target, trainer.drafter, texts["prompt_ids"], trainer.speculation_settings())
    timed = {f"eval_{name}" for name in ("runtime", "tokens_per_second", "draft_seconds", "verify_seconds")}
    for name, value in report.metrics().items():
        assert name in timed or metrics[name] == value, name
    both = trainer.evaluate({"a": held_out, "b": held_out.select(range(4))})
    assert both["eval_a_acceptance_length"] == pytest.approx(expected)
    assert both["eval_b_prompts"] == 4


def test_evaluation_during_training_leaves_the_run_as_it_was(drafter_folder, model, texts, tmp_path):
    plain = make_trainer(drafter_folder, model, texts, tmp_path, max_steps=2, rollout_source="speculation")
    watched = make_trainer(
        drafter_folder,
        model,
        texts,
        tmp_path,
        max_steps=2,
        rollout_source="speculation",
        eval_dataset=texts.select_columns(["prompt_ids"]),
        eval_strategy="steps",
        eval_steps=1,
    )
    for trainer in (plain, watched):
        trainer.train()
    assert sum("eval_acceptance_length" in log for log in watched.state.log_history) == 2
    for name, value in parameters_of(plain).items():
        assert torch.equal(value, parameters_of(watched)[name]), name


def test_it_says_how_many_proposals_to_serve_with(drafter_folder, model, texts, tmp_path, monkeypatch):
    """By rounds that cost nothing for one text, and far too much for two."""

    def seconds(target, drafter, prompts, settings):
        return 1.0 if drafter is None or len(prompts) == 1 else 9.0

    monkeypatch.setattr(round_costs, "round_seconds", seconds)
    evaluated = {"eval_dataset": texts.select_columns(["prompt_ids"]), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        drafter_folder, model, texts, tmp_path, max_steps=1, serve_batch_sizes=[1, 2], report_to="none", **evaluated
    )
    trainer.train()
    assert not any("serve" in name for log in trainer.state.log_history for name in log)  # the run would wait for it
    trainer.save_model()
    metrics = trainer.evaluate()
    slots = [metrics[f"eval_acceptance_slot_{k}"] for k in range(1, trainer.drafter.num_draft_tokens + 1)]
    told = [metrics[f"eval_serve_batch_1_{name}"] for name in ("num_draft_tokens", "speedup")]
    assert 0 < told[0] <= len(slots) and told[1] == pytest.approx(1 + sum(slots))
    assert [metrics[f"eval_serve_batch_2_{name}"] for name in ("num_draft_tokens", "speedup")] == [0, 1.0]
    assert [one["batch_size"] for one in trainer.serving] == [1, 2]
    card = (tmp_path / "README.md").read_text()
    assert f"| to serve with at batch 1 | K = {told[0]} ({told[1]:.2f} times plain) |" in card
    assert "| to serve with at batch 2 | no drafter |" in card and "foreseen from rounds" in card


def test_the_checkpoint_with_the_longest_accepted_runs_is_kept(model, texts, tmp_path, monkeypatch):
    """τ rises, falls, and stays low: the second checkpoint is the best, and two that are no better end it."""
    taus, measured = iter([3.0, 5.0, 4.0, 4.5, 9.0, 9.0]), AcceptanceReport.metrics

    def metrics(report, prefix):
        return measured(report, prefix) | {f"{prefix}_acceptance_length": next(taus)}

    monkeypatch.setattr(AcceptanceReport, "metrics", metrics)
    kept = KeepWeights()
    trainer = make_trainer(
        tiny_drafter(ANY_KIND, Target(model)),
        model,
        texts,
        tmp_path,
        eval_dataset=texts.select_columns(["prompt_ids"]).select(range(2)),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), kept],
        max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_acceptance_length",
    )
    assert trainer.args.greater_is_better
    trainer.train()
    assert (trainer.state.global_step, trainer.state.best_global_step, trainer.weights_step) == (4, 2, 2)
    for name, value in parameters_of(trainer).items():
        assert torch.equal(value, kept.at[2][name]) and not torch.equal(value, kept.at[4][name]), name
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.at = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.at[state.global_step] = {name: value.detach().clone() for name, value in model.named_parameters()}
