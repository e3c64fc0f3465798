"""What only a library can judge: tried on one parameter, and told in one line, before anything expensive."""

import pytest
import torch
from transformers import TrainingArguments

from draft_opd_trl.core.errors import EnvironmentFault, InputError, UserError
from draft_opd_trl.training import probing
from draft_opd_trl.training.config import DraftOPDConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": -1e5}}, "`lr_scheduler_type`"),
        ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "`lr_scheduler_type` is 'cosine' with"),
        ({"dataloader_prefetch_factor": 2}, "`dataloader_prefetch_factor` is 2; transformers refuses that"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, "`load_best_model_at_end` is True"),
        ({"accelerator_config": {"wings": 2}}, "`accelerator_config` is {'wings': 2}"),
        ({"optim": "rmsprop", "optim_args": "alpha=5"}, "whose steps are not finite"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, "`optim_args` 'momentum=x', which cannot be made"),
        ({"ddp_backend": "nccl"}, "`ddp_backend` is 'nccl'"),
    ],
)
def test_what_libraries_would_say_unclearly_or_too_late(settings, words):
    with pytest.raises(UserError) as raised:
        DraftOPDConfig("out", report_to=[], **{"eval_steps": 7, **settings})
    assert words in str(raised.value) and "\n" not in str(raised.value)


def given(**settings):
    return TrainingArguments("out", report_to=[], **settings)


def raising(error):
    def check():
        raise error

    return check


def test_a_librarys_error_names_the_settings_that_it_speaks_of():
    """By their own names or by classes called after them; where it speaks of none, what was given."""
    settings = given(seed=7, save_steps=3)
    defaults = {"seed": 42, "save_steps": 500, "accelerator_config": None, "output_dir": None}
    for told, named in (
        ("seed is odd\n and more.", "`seed` is 7; transformers refuses that: seed is odd and more. Change it"),
        ("AcceleratorConfig has no x", "`accelerator_config` is "),
        ("no", "`seed` is 7, `save_steps` is 3, `accelerator_config`"),
    ):
        with pytest.raises(InputError) as raised:
            probing.as_input_errors(settings, defaults, raising(TypeError(told)))
        assert str(raised.value).startswith(named)
    own = InputError("ours")
    with pytest.raises(InputError) as raised:
        probing.as_input_errors(settings, defaults, raising(own))
    assert raised.value is own


def test_an_optimizer_of_a_package_that_is_not_here(monkeypatch):
    def missing(*args):
        raise ImportError("no module\nnamed x")

    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", missing)
    with pytest.raises(EnvironmentFault, match="`optim` is 'lomo', whose package is not here .no module named x."):
        probing.try_optimizer(given(optim="lomo"))
    probing.try_optimizer(given(optim="sgd"))  # PyTorch's own are not asked for


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"])
def test_schedules_that_are_right(name):
    asked = given(lr_scheduler_type=name, eval_strategy="epoch")
    before = asked.to_dict()
    probing.try_schedule(asked)
    assert asked.to_dict() == before


def test_a_compiler_that_pytorch_does_not_have(monkeypatch):
    asked = given()
    asked.torch_compile, asked.torch_compile_backend = True, "warp"
    monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor", "eager"])
    with pytest.raises(InputError, match="`torch_compile_backend` is 'warp'; it must be one of inductor, eager"):
        probing.check_backend(asked)
    asked.torch_compile_backend = "eager"
    probing.check_backend(asked)


def test_trackers_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(probing, "get_available_reporting_integrations", lambda: ["tensorboard"])
    asked = given()
    asked.report_to = ["wandb", "tensorboard", "flyte"]
    with pytest.raises(EnvironmentFault, match="but wandb cannot be used here"):
        probing.check_trackers(asked)
    asked.report_to = ["tensorboard"]
    probing.check_trackers(asked)
