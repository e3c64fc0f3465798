"""The trainer: what it trains, that layouts do not matter, that it resumes, what it logs, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import STOP, tiny_model, tiny_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from draft_opd_trl import (
    DraftOPDConfig,
    DraftOPDTrainer,
    SpeculationSettings,
    load_drafter,
    measure_acceptance,
    speculate,
)
from draft_opd_trl.target import Target


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def texts(model):
    """Sixteen texts the target wrote."""
    draws = torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, 30, (3 + i % 4,), generator=draws).tolist() for i in range(16)]
    rollout = speculate(Target(model), None, prompts, SpeculationSettings(20, [STOP, 3], batch_size=16))
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": rollout.completions()})


def make_trainer(drafter_folder, model, dataset, output_dir, **options):
    defaults = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_completion_length": 20,
        "num_anchors": 6,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "rollout_source": "dataset",
    }
    beside = ("eval_dataset", "peft_config", "callbacks", "optimizers")
    more = {name: options.pop(name) for name in beside if name in options}
    args = DraftOPDConfig(str(output_dir), **{**defaults, **options})
    return DraftOPDTrainer(
        drafter_folder, model, args, train_dataset=dataset, processing_class=tiny_tokenizer(), **more
    )


def parameters_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.drafter.named_parameters()}


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("source", ["speculation", "generate", "dataset"])
def test_training_moves_every_drafter_parameter_and_no_target_weight(
    drafter_folder, model, texts, tmp_path, lmbda, source
):
    before_target = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, lmbda=lmbda, rollout_source=source)
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert all(torch.equal(before_target[name], value) for name, value in model.state_dict().items())
    assert not any(value.requires_grad for value in model.parameters())
    # The target must not travel with the drafter.
    assert {id(p) for p in trainer.model.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_the_rejected_stream_trains_from_kept_states_as_from_scored_ones(drafter_folder, model, texts, tmp_path):
    """Fresh blocks of a rollout and the replay of the same text are the same batch."""
    options = {"rejected_weight": 1.0, "num_anchors": 100, "shuffle_dataset": False}
    fresh = make_trainer(drafter_folder, model, texts, tmp_path, rollout_source="speculation", **options)
    replayed = make_trainer(drafter_folder, model, texts, tmp_path, rollout_source="dataset", **options)
    for trainer in (fresh, replayed):
        trainer.train()
    for name, value in parameters_of(fresh).items():
        torch.testing.assert_close(value, parameters_of(replayed)[name], atol=2e-4, rtol=1e-3)


def test_the_on_policy_share_moves_linearly(drafter_folder, model, texts, tmp_path, monkeypatch):
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, lmbda=1.0, lmbda_end=0.0, max_steps=3)
    feed, shares = trainer.feed, []
    serve = feed.next
    monkeypatch.setattr(feed, "next", lambda *rest: shares.append(rest[-1]) or serve(*rest))
    trainer.train()
    assert shares == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_eight_at_once_equal_two_times_four_accumulated(drafter_folder, model, texts, tmp_path, lmbda):
    options = {"lmbda": lmbda, "rejected_weight": 0.5, "optim": "sgd", "max_steps": 3}
    whole = make_trainer(drafter_folder, model, texts, tmp_path, per_device_train_batch_size=8, **options)
    halves = make_trainer(
        drafter_folder, model, texts, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )
    for trainer in (whole, halves):
        trainer.train()
    for name, value in parameters_of(whole).items():
        torch.testing.assert_close(value, parameters_of(halves)[name], atol=1e-5, rtol=1e-4)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (whole, halves)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class StopAt(TrainerCallback):
    """Ends a run early without changing its schedule, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


@pytest.mark.parametrize("step", [3, 4, 5], ids=["inside-cycle", "end-of-epoch", "second-epoch"])
def test_a_resumed_run_is_the_same_run(drafter_folder, model, texts, tmp_path, step):
    """Weights, optimizer, schedule, random state, order of rows, texts in use and buffer."""
    options = {
        "rollout_source": "speculation",
        "temperature": 0.8,
        "teacher_temperature": 0.8,
        "rejected_weight": 0.3,
        "lmbda": 0.5,
        "replay_buffer_size": 8,
        "replay_ratio": 0.5,
        "replay_by_loss": True,
        "steps_per_generation": 2,
        "lr_scheduler_type": "cosine",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": step,
        "logging_steps": 2,  # of which a checkpoint may cut a window in two
    }
    whole = make_trainer(drafter_folder, model, texts, tmp_path / "whole", **options)
    whole.train()
    cut = make_trainer(drafter_folder, model, texts, tmp_path / "cut", callbacks=[StopAt(step)], **options)
    cut.train()
    assert cut.state.global_step == step
    resumed = make_trainer(drafter_folder, model, texts, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    for name, value in parameters_of(whole).items():
        torch.testing.assert_close(value, parameters_of(resumed)[name], atol=0, rtol=0)
    assert whole.error_buffer.entries == resumed.error_buffer.entries
    assert any(loss is not None for entry in whole.error_buffer.entries.values() for loss in entry.losses.values())
    assert _figures(whole) == _figures(resumed) and len(_figures(whole)) == 3


def _figures(trainer):
    """All that was logged of training steps, times aside."""
    return [
        {name: value for name, value in log.items() if "time" not in name}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def test_train_save_load_proposes_the_same(drafter_folder, model, texts, tmp_path):
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model()
    loaded = load_drafter(str(tmp_path)).bind(trainer.target)
    settings = SpeculationSettings(20, [STOP, 3], batch_size=4)
    trainer.drafter.eval()
    ours = speculate(trainer.target, trainer.drafter, texts["prompt_ids"], settings).blocks
    theirs = speculate(trainer.target, loaded, texts["prompt_ids"], settings).blocks
    assert torch.equal(ours.draft_tokens, theirs.draft_tokens)
    assert torch.equal(ours.num_accepted, theirs.num_accepted)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(loaded).__name__]


def test_logs_carry_trl_names_and_ours(drafter_folder, model, texts, tmp_path):
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, rollout_source="speculation", rejected_weight=0.5)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in (
        "loss",
        "num_tokens",
        "step_time",
        "completions/mean_length",
        "completions/clipped_ratio",
        "acceptance/length",
        "acceptance/slot_1",
        "replay/blocks",
        "replay/error_share",
        "replay/supervised_tokens",
        "time/rollout",
        "time/target_text",
        "time/replay",
        "time/forward",
        "time/backward",
        "loss/accepted",
        "loss/rejected",
    ):
        assert name in log, name
    assert 1 <= log["acceptance/length"] <= trainer.drafter.num_draft_tokens + 1


def test_evaluate_is_real_speculative_decoding(drafter_folder, model, texts, tmp_path):
    held_out = texts.select_columns(["prompt_ids"])
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, eval_dataset=held_out)
    metrics = trainer.evaluate()
    settings = SpeculationSettings(20, [STOP, 3], batch_size=1)
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
    plain = make_trainer(drafter_folder, model, texts, tmp_path, max_steps=3, rollout_source="speculation")
    watched = make_trainer(
        drafter_folder,
        model,
        texts,
        tmp_path,
        max_steps=3,
        rollout_source="speculation",
        eval_dataset=texts.select_columns(["prompt_ids"]),
        eval_strategy="steps",
        eval_steps=1,
    )
    for trainer in (plain, watched):
        trainer.train()
    assert sum("eval_acceptance_length" in log for log in watched.state.log_history) == 3
    for name, value in parameters_of(plain).items():
        assert torch.equal(value, parameters_of(watched)[name]), name


def test_conversational_prompts_with_template_switches(drafter_folder, model, tmp_path):
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": "abc"}]] * 8})
    thinking = make_trainer(drafter_folder, model, dataset, tmp_path, rollout_source="generate")
    without = make_trainer(
        drafter_folder,
        model,
        dataset,
        tmp_path,
        rollout_source="generate",
        chat_template_kwargs={"enable_thinking": False},
    )
    # The switch adds one token to the generation prompt.
    assert without.train_dataset[0]["prompt_ids"] == [*thinking.train_dataset[0]["prompt_ids"], 4]
    without.train()
    assert without.state.global_step == 2


def test_stop_tokens_are_all_the_targets_and_the_tokenizers(drafter_folder, model, texts, tmp_path):
    assert sorted(make_trainer(drafter_folder, model, texts, tmp_path).stop_token_ids) == [0, 3]


def test_lora_trains_the_adapter_alone(drafter_folder, model, texts, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, peft_config=config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if "lora_" in name}


def test_adapters_on_all_matrices_leave_the_head_alone(drafter_folder, model, texts, tmp_path):
    """The losses read the head's weight, so an adapter there would train nothing."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, peft_config=config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert before and not any("lm_head" in name for name in before)
    unmoved = [
        name for name, value in trainer.model.named_parameters() if torch.equal(before.get(name, value + 1), value)
    ]
    assert unmoved == []


def test_soft_targets_train_and_text_outside_a_draft_vocabulary_is_logged(drafter_folder, model, texts, tmp_path):
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, lmbda=0.0, teacher_temperature=1.0)
    before = parameters_of(trainer)
    trainer.train()
    assert not [name for name, value in parameters_of(trainer).items() if torch.equal(before[name], value)]
    log = trainer.state.log_history[0]
    assert log["loss/accepted"] > 0
    if trainer.drafter.vocab_map is None:
        assert "replay/outside_vocab" not in log
    else:
        assert 0 < log["replay/outside_vocab"] < 1


def test_in_the_kernel_a_run_is_what_it_is_in_chunks(drafter_folder, model, texts, tmp_path, monkeypatch):
    """Both streams through TRL's kernel, which is chosen on CUDA alone but runs anywhere."""
    options = {"teacher_temperature": 1.0, "rejected_weight": 0.5, "optim": "sgd", "loss_chunk_size": 32}
    chunks = make_trainer(drafter_folder, model, texts, tmp_path, **options)
    chunks.train()
    monkeypatch.setattr("draft_opd_trl.losses.uses_kernel", lambda *_: True)
    monkeypatch.delattr("draft_opd_trl.losses._chunk_loss")
    kernel = make_trainer(drafter_folder, model, texts, tmp_path, **options)
    before = parameters_of(kernel)
    kernel.train()
    for name, value in parameters_of(chunks).items():
        torch.testing.assert_close(parameters_of(kernel)[name], value, atol=1e-5, rtol=1e-4)
        assert not torch.equal(before[name], value), name


def refuses(message, drafter_folder, model, dataset, tmp_path, error=ValueError, **options):
    with pytest.raises(error, match=message):
        make_trainer(drafter_folder, model, dataset, tmp_path, **options)


def test_bad_input_is_refused_before_any_work(drafter_folder, model, texts, tmp_path):
    empty, unknown = Dataset.from_dict({"prompt": []}), Dataset.from_dict({"question": ["a"] * 8})
    source = {"rollout_source": "generate"}
    refuses("`train_dataset` is empty", drafter_folder, model, empty, tmp_path, **source)
    refuses(r"columns \['question'\]", drafter_folder, model, unknown, tmp_path, **source)
    refuses("16 rows, fewer than one generation batch of 32", drafter_folder, model, texts, tmp_path,
            per_device_train_batch_size=32)  # fmt: skip
    refuses("prompt of 3 tokens, more than max_prompt_length=2", drafter_folder, model, texts, tmp_path,
            max_prompt_length=2)  # fmt: skip
    refuses("none of which is 'completion'", drafter_folder, model, texts.select_columns(["prompt_ids"]), tmp_path)
    refuses("is not a folder here", str(tmp_path / "nowhere"), model, texts, tmp_path, FileNotFoundError)
    refuses("task_type is", drafter_folder, model, texts, tmp_path, peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        make_trainer(drafter_folder, model, None, tmp_path).train()
    with pytest.raises(ValueError, match="needs prompts"):
        make_trainer(drafter_folder, model, texts, tmp_path).evaluate()


def test_a_drafter_of_another_target_is_refused(drafter_folder, texts, tmp_path):
    refuses("does not fit the target", drafter_folder, tiny_model("qwen3", vocab_size=40), texts, tmp_path)
    refuses("does not fit the target", drafter_folder, tiny_model("qwen3", hidden_size=16), texts, tmp_path)


def test_a_target_without_stop_tokens_is_refused(drafter_folder, texts, tmp_path):
    bare, tokenizer = tiny_model("qwen3"), tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="No stop token"):
        DraftOPDTrainer(drafter_folder, bare, DraftOPDConfig(str(tmp_path)), texts, processing_class=tokenizer)


def test_the_script_names_what_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "--model_name_or_path", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert "--teacher_model_name_or_path" in done.stderr and "--dataset_name" in done.stderr
