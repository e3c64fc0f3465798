"""Defaults that belong together, values that cannot be, and the settings that rooms are given."""

import dataclasses
import math

import pytest
import torch

from draft_opd_trl.training.config import DraftOPDConfig


def _config(tmp_path, **settings):
    return DraftOPDConfig(output_dir=str(tmp_path), report_to=[], **settings)


def test_defaults(tmp_path):
    config = _config(tmp_path)
    assert config.lmbda == 1.0 and config.temperature == 0.0 and config.rollout_source == "speculation"
    assert config.accepted_weight == 1.0 and config.rejected_weight == 0.0
    # A greedy rollout is verified greedily: hard targets.
    assert config.teacher_temperature == 0.0
    assert (config.accepted_loss, config.rejected_loss) == ("ce", "ce")
    assert config.remove_unused_columns is False
    assert not config.gradient_checkpointing


def test_teacher_temperature_follows_the_rollout(tmp_path):
    config = _config(tmp_path, temperature=0.7)
    assert config.teacher_temperature == 0.7
    assert (config.accepted_loss, config.rejected_loss) == ("forward_kl", "reverse_kl")
    config = _config(tmp_path, temperature=0.0, teacher_temperature=1.0)
    assert (config.accepted_loss, config.rejected_loss) == ("forward_kl", "reverse_kl")
    assert _config(tmp_path, temperature=0.7, accepted_loss="tv").accepted_loss == "tv"


def test_the_papers_recipe_is_pinned(tmp_path):
    config = DraftOPDConfig(str(tmp_path), recipe="paper")
    assert (config.optim, config.learning_rate, config.lr_scheduler_type) == ("adamw_torch", 3e-4, "cosine")
    assert (config.warmup_steps, config.num_train_epochs) == (0.05, 7)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (21, 10)
    assert (config.max_prompt_length, config.max_completion_length) == (512, 4096)
    assert (config.temperature, config.teacher_temperature, config.lmbda) == (0, 1, 1)
    assert (config.accepted_loss, config.rejected_loss) == ("bernoulli_forward_kl", "k3")
    assert (config.accepted_weight, config.rejected_weight) == (1, 1)
    assert (config.accepted_decay, config.rejected_decay) == (1, 0.8)
    assert (config.loss_max_clamp, config.log_prob_min_clamp) == (10, -10)


def test_steps_per_generation_defaults_to_one_optimizer_step(tmp_path):
    assert _config(tmp_path, gradient_accumulation_steps=3).steps_per_generation == 3
    assert _config(tmp_path, gradient_accumulation_steps=3, steps_per_generation=6).steps_per_generation == 6


def test_dict_settings_may_come_as_json(tmp_path):
    config = _config(tmp_path, chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(), reason="needs a machine without GPU"
)
def test_a_machine_without_gpu_trains_in_float32(tmp_path):
    config = _config(tmp_path)
    assert config.use_cpu and not config.bf16
    assert _config(tmp_path, bf16=True).bf16
    with pytest.raises(ValueError, match="fp16=True, but there is no GPU. Leave `fp16` unset, or set bf16=True"):
        _config(tmp_path, fp16=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lmbda": 1.5}, r"`lmbda` is 1.5; it must lie in \[0, 1\] \(the on-policy share\). Its default is 1.0"),
        ({"lmbda": -0.1}, "`lmbda` is -0.1; it must lie in"),
        (
            {"rollout_source": "magic"},
            "`rollout_source` is 'magic'; it must be one of speculation, generate, server, dataset",
        ),
        ({"recipe": "ours"}, "`recipe` is 'ours'; it must be one of accepted_length, auf, d"),
        (
            {"label_smoothing_factor": 0.1},
            "`label_smoothing_factor` is 0.1; it cannot be used here: the losses here take the target's distribution",
        ),
        ({"lmbda_end": 2.0}, "`lmbda_end` is 2.0; it must lie in"),
        ({"server_timeout": 0.0}, r"`server_timeout` is 0.0; it must lie in \(0, "),
        ({"server_concurrency": 0}, r"`server_concurrency` is 0; it must lie in \["),
        ({"server_max_retries": -1}, "`server_max_retries` is -1; it must "),
        ({"regenerate_every": 0}, r"`regenerate_every` is 0; it must lie in \["),
        ({"num_texts_to_check": -1}, "`num_texts_to_check` is -1; it must "),
        ({"accepted_loss": "hinge"}, "`accepted_loss` is 'hinge'; it must be one of ce, forward_kl, reverse_kl"),
        ({"rejected_loss": "hinge"}, "`rejected_loss` is 'hinge'; it must be one of ce, forward_kl, reverse_kl"),
        ({"temperature": -1.0}, "`temperature` is -1.0; it must "),
        ({"teacher_temperature": -1.0}, "`teacher_temperature` is -1.0; it must "),
        ({"accepted_weight": -1.0}, "`accepted_weight` is -1.0; it must "),
        ({"rejected_weight": -1.0}, "`rejected_weight` is -1.0; it must "),
        ({"replay_ratio": -1.0}, "`replay_ratio` is -1.0; it must "),
        ({"rejected_decay": -0.1}, r"`rejected_decay` is -0.1; it must lie in \[0, 1\]"),
        ({"accepted_decay": 1.1}, r"`accepted_decay` is 1.1; it must lie in \(0, 1\]"),
        ({"num_anchors": 0}, r"`num_anchors` is 0; it must lie in \["),
        ({"num_chains": 0}, r"`num_chains` is 0; it must lie in \["),
        ({"rollout_batch_size": 0}, r"`rollout_batch_size` is 0; it must lie in \["),
        ({"loss_chunk_size": 0}, r"`loss_chunk_size` is 0; it must lie in \["),
        ({"steps_per_generation": 0}, r"`steps_per_generation` is 0; it must lie in \["),
        ({"max_completion_length": 0}, r"`max_completion_length` is 0; it must lie in \["),
        ({"max_completion_length": 1}, "`max_completion_length` is 1.*a text of one token holds no block"),
        ({"top_p": 0.0}, r"`top_p` is 0.0; it must lie in \(0, 1\]"),
        ({"top_k": -1}, "`top_k` is -1; .*0 keeps all tokens"),
        ({"beta": 2.0}, r"`beta` is 2.0; it must lie in \[0, 1\]"),
        ({"logging_steps": 1.5}, "`logging_steps` is 1.5; it must be a whole number where it is above 1"),
        ({"optim": "adam"}, "`optim` is 'adam'; it must be one of"),
        ({"lr_scheduler_type": "cosin"}, r"Did you mean cosine\?"),
        (
            {"lr_scheduler_kwargs": {"num_cycles": math.nan}},
            "`lr_scheduler_kwargs` is {'num_cycles': nan}; it must hold plain",
        ),
        ({"debug": "underflow_overflow"}, "`debug` is 'underflow_overflow'; it cannot be used here"),
        (
            {"metric_for_best_model": "loss", "load_best_model_at_end": True, "save_strategy": "best"},
            "acceptance_length",
        ),
        ({"model_init_kwargs": {"dtype": "fp16"}}, "'dtype' = 'fp16', which must be one of auto, float32"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}}, "write true or false without quotes"),
        ({"server_url": "http://me:secret@host:99999999"}, r"http://\*\*\*@host:99999999"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_range(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        _config(tmp_path, **settings)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_rooms_get_what_was_set(tmp_path):
    """Each setting of a room, by the name that it has here; all of them other than the room's own default."""
    law = {"temperature": 0.5, "top_k": 3, "top_p": 0.25}
    assert dataclasses.asdict(_config(tmp_path, **law).sampling) == law
    blocks = {"num_anchors": 5, "num_chains": 2, "replay_ratio": 0.5}
    on_policy = dataclasses.asdict(_config(tmp_path, replay_buffer_size=3, **blocks).on_policy)
    assert on_policy == {**blocks, "anchors": "exposed"}
    assert _config(tmp_path, anchors="random").on_policy.anchors == "random"
    streams = {"accepted_weight": 0.5, "rejected_weight": 0.25, "rejected_decay": 0.5, "accepted_decay": 0.75}
    streams["sft_decay"] = 0.125
    assert dataclasses.asdict(_config(tmp_path, **streams).streams) == {**streams, "whole_blocks": False}
    settings = {"teacher_temperature": 2.0, "beta": 0.25, "loss_max_clamp": 3.0, "log_prob_min_clamp": -4.0}
    kinds = {"accepted_loss": "jsd", "rejected_loss": "tv", "rejected_weight": 0.5}
    losses = _config(tmp_path, loss_chunk_size=7, **settings, **kinds).losses
    assert (losses.accepted.kind, losses.rejected.kind, losses.chunk_size) == ("jsd", "tv", 7)
    for loss in (losses.accepted, losses.rejected):
        assert [*dataclasses.astuple(loss)][1:] == [*settings.values(), None]
    weighed = _config(tmp_path, dpace_alpha=0.25, rejected_weight=0.5)
    assert (weighed.losses.accepted.dpace_alpha, weighed.losses.rejected.dpace_alpha) == (0.25, None)
    assert weighed.streams.sft_decay == 1, "and not the architecture's own"


def test_what_is_asked_of_settings_has_one_answer(tmp_path):
    config = _config(tmp_path)
    assert config.sampling.greedy and config.any_on_policy and not config.streams.scores_rejected
    assert not _config(tmp_path, temperature=0.5).sampling.greedy
    assert _config(tmp_path, rejected_weight=0.5).streams.scores_rejected
    shares = [(0.0, None), (0.0, 0.0), (0.0, 0.5), (0.5, 0.0)]
    asked = [_config(tmp_path, lmbda=start, lmbda_end=end).any_on_policy for start, end in shares]
    assert asked == [False, False, True, True]


def test_lmbda_moves_linearly(tmp_path):
    assert [_config(tmp_path, lmbda=0.25).lmbda_at(step, 3) for step in range(3)] == [0.25] * 3
    falling = _config(tmp_path, lmbda=1.0, lmbda_end=0.0)
    assert [falling.lmbda_at(step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert _config(tmp_path, lmbda_end=0.5).lmbda_at(0, 1) == 1.0


def test_the_best_checkpoint_is_that_of_the_longest_acceptance_length():
    config = DraftOPDConfig("out", report_to=[], load_best_model_at_end=True, eval_strategy="steps", eval_steps=500)
    assert config.metric_for_best_model == "acceptance_length" and config.greater_is_better
