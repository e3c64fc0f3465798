"""Evaluation by a trainer: it is real speculative decoding, and leaves the run as it was."""

import pytest
import torch
from conftest import STOPS
from runs import make_trainer, parameters_of, spelled_prompts, written_texts

from draft_opd_trl import (
    SpeculationSettings,
    measure_acceptance,
    speculate,
)


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
