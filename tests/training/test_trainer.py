"""The trainer: what it trains, that layouts do not matter, that it resumes, what it logs, and what it refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, STOPS, tiny_model, tiny_tokenizer
from datasets import Dataset
from invariants import assert_a_resumed_run_is_the_same_run
from peft import LoraConfig
from runs import make_trainer, parameters_of, spelled_prompts, written_texts

from draft_opd_trl import (
    DraftOPDConfig,
    DraftOPDTrainer,
    SpeculationSettings,
    load_drafter,
    speculate,
)


@pytest.fixture(scope="module")
def texts(model):
    return written_texts(model, spelled_prompts(16))


@pytest.mark.parametrize(
    ("source", "lmbda"),
    [("speculation", 0.0), ("speculation", 1.0), ("generate", 0.5), ("dataset", 0.0), ("dataset", 1.0)],
)
def test_training_moves_every_drafter_parameter_and_no_target_weight(
    drafter_folder, model, texts, tmp_path, source, lmbda
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


def test_mixed_precision_on_a_cpu(drafter_folder, model, texts, tmp_path):
    """Only where it is asked for: the loss is float32's to rounding, and weights stay in float32."""
    losses = []
    for bf16 in (None, True):
        trainer = make_trainer(drafter_folder, model, texts, tmp_path, bf16=bf16, max_steps=1)
        assert trainer.args.bf16 is bool(bf16)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert all(value.dtype == torch.float32 for value in parameters_of(trainer).values())
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_the_rejected_stream_trains_from_kept_states_as_from_scored_ones(drafter_folder, model, texts, tmp_path):
    """Fresh blocks of a rollout and the replay of the same text are the same batch."""
    # Muon, which makes steps of one size, would make rounding grow.
    options = {"rejected_weight": 1.0, "num_anchors": 100, "shuffle_dataset": False, "optim": "sgd"}
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


def test_a_resumed_run_is_the_same_run(drafter_folder, model, texts, tmp_path):
    """Invariant 7, run part; cut inside a cycle, at the end of an epoch and in the second."""

    def build(output_dir, **options):
        return make_trainer(drafter_folder, model, texts, output_dir, **options)

    assert_a_resumed_run_is_the_same_run(build, tmp_path, 3, 4, 5)


def test_train_save_load_proposes_the_same(drafter_folder, model, texts, tmp_path):
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model()
    loaded = load_drafter(str(tmp_path)).bind(trainer.target)
    settings = SpeculationSettings(20, STOPS, batch_size=4)
    trainer.drafter.eval()
    ours = speculate(trainer.target, trainer.drafter, texts["prompt_ids"], settings).blocks
    theirs = speculate(trainer.target, loaded, texts["prompt_ids"], settings).blocks
    assert torch.equal(ours.draft_tokens, theirs.draft_tokens)
    assert torch.equal(ours.num_accepted, theirs.num_accepted)
    config = json.loads((tmp_path / "config.json").read_text())
    assert type(loaded).recognises(config)


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
    """A head is adapted where it is named, as with PEFT's other models."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(drafter_folder, model, texts, tmp_path, peft_config=config)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert before and not any("lm_head" in name for name in before)
    assert [name for name, value in before.items() if torch.equal(value, after[name])] == []


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
    if chunks.drafter.linear_head is None:
        pytest.skip("its head is no plain product, which is all that the kernel takes")
    chunks.train()
    monkeypatch.setattr("draft_opd_trl.training.losses.uses_kernel", lambda *_: True)
    monkeypatch.delattr("draft_opd_trl.training.losses._chunk_losses")
    kernel = make_trainer(drafter_folder, model, texts, tmp_path, **options)
    before = parameters_of(kernel)
    kernel.train()
    for name, value in parameters_of(chunks).items():
        torch.testing.assert_close(parameters_of(kernel)[name], value, atol=1e-5, rtol=1e-4)
        assert not torch.equal(before[name], value), name


def test_bad_input_is_refused_before_any_work(drafter_folder, model, texts, tmp_path):
    def assert_refused(message, drafter=drafter_folder, dataset=texts, error=ValueError, **options):
        with pytest.raises(error, match=message):
            make_trainer(drafter, model, dataset, tmp_path, **options)

    empty, unknown = Dataset.from_dict({"prompt": []}), Dataset.from_dict({"question": ["a"] * 8})
    assert_refused("`train_dataset` is empty", dataset=empty, rollout_source="generate")
    assert_refused(r"columns \['question'\]", dataset=unknown, rollout_source="generate")
    assert_refused("16 rows, fewer than one generation batch of 32", per_device_train_batch_size=32)
    assert_refused("prompt of 3 tokens, more than max_prompt_length=2", max_prompt_length=2)
    assert_refused("none of which is 'completion'", dataset=texts.select_columns(["prompt_ids"]))
    assert_refused("is not a folder here", drafter=str(tmp_path / "nowhere"), error=FileNotFoundError)
    assert_refused("task_type is", peft_config=LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="needs a `train_dataset`"):
        make_trainer(drafter_folder, model, None, tmp_path).train()
    with pytest.raises(ValueError, match="needs prompts"):
        make_trainer(drafter_folder, model, texts, tmp_path).evaluate()


def test_a_drafter_of_another_target_is_refused(drafter_folder, texts, tmp_path):
    with pytest.raises(ValueError, match="does not fit the target"):
        make_trainer(drafter_folder, tiny_model("qwen3", vocab_size=40), texts, tmp_path)


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
