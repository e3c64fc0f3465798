"""Settings that only a library can judge, tried on one parameter before anything expensive.

Optimizer, schedule, trackers, and what transformers says of all settings together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from ..core.errors import EnvironmentFault, InputError, UserError
from ..core.redaction import shown
from .optim import MUON


if TYPE_CHECKING:
    from transformers import TrainingArguments


TRACKERS = tuple(INTEGRATION_TO_CALLBACK)
# PyTorch's own, which take what the limits allow.
_PLAIN_OPTIMIZERS = (MUON, "adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
# Fields that are always given, and never the cause.
_SAYS_NOTHING = ("output_dir", "report_to", "disable_tqdm", "include_for_metrics", "bf16", "use_cpu")
# Schedules that read evaluations, which are not there before training.
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:400] or type(error).__name__


def as_input_errors(settings: Any, defaults: Mapping[str, Any], check: Callable[[], None]) -> None:
    """
    What a library's check of `settings` raises, as an `InputError` that names the setting where the library does.

    Args:
        settings (dataclass instance): What is checked.
        defaults (`Mapping[str, Any]`): Its values where nothing was given; others may be the cause.
        check (`Callable`): The library's check, and nothing of ours.
    """
    try:
        check()
    except UserError:
        raise
    except Exception as error:
        told = _one_line(error)
        words = set(re.findall(r"\w+", told))
        squeezed = {word.lower() for word in words}  # classes, such as AcceleratorConfig
        given = {
            name: getattr(settings, name)
            for name, default in defaults.items()
            if getattr(settings, name) != default and name not in _SAYS_NOTHING
        }
        named = [name for name in given if name in words or name.replace("_", "") in squeezed]
        given = {name: given[name] for name in named or list(given)[:5]}
        values = ", ".join(f"`{name}` is {shown(name, value)}" for name, value in given.items())
        raise InputError(
            f"{values or 'The settings do not go together'}; transformers refuses that: {told.rstrip('.')}. Change "
            f"{'it' if len(given) == 1 else 'one of them'}, or leave it at its default."
        ) from error


def _parameter() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    return parameter


def try_optimizer(args: TrainingArguments) -> None:
    """
    Raises:
        `OSError`: The optimizer's package is not here.
        `ValueError`: It does not take its arguments.
    """
    if args.optim in _PLAIN_OPTIMIZERS and not args.optim_args:
        return
    from transformers import Trainer

    name = str(getattr(args.optim, "value", args.optim))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Linear(1, 1))
        parameter = _parameter()
        if args.optim_target_modules is None:
            optimizer = kind([parameter], **options)
            for _ in range(3):
                parameter.grad = torch.ones(1)
                optimizer.step()
    except ImportError as error:
        raise EnvironmentFault(
            f"`optim` is {name!r}, whose package is not here ({_one_line(error)}). Install it, or choose adamw_torch."
        ) from error
    except Exception as error:
        given = f" with `optim_args` {args.optim_args!r}" if args.optim_args else ""
        raise InputError(
            f"`optim` is {name!r}{given}, which cannot be made ({_one_line(error)}). Correct `optim_args`, "
            "install what it needs, or choose adamw_torch."
        ) from error
    if not parameter.isfinite().all():
        raise InputError(
            f"`optim` is {name!r} with `optim_args` {args.optim_args!r}, whose steps are not finite. Correct "
            "`optim_args`."
        )


def try_schedule(args: TrainingArguments) -> None:
    """
    Raises:
        `ValueError`: The schedule does not take its arguments, or gives rates that are not numbers.
    """
    if args.lr_scheduler_type in SCHEDULES_BY_METRIC:
        return
    name, options = str(args.lr_scheduler_type.value), args.lr_scheduler_kwargs or {}
    given = shown("lr_scheduler_kwargs", options)
    optimizer = torch.optim.SGD([_parameter()], lr=args.learning_rate)
    try:
        schedule = get_scheduler(name, optimizer, 1, 4, scheduler_specific_kwargs=dict(options))
        rates = []
        for _ in range(4):
            optimizer.step()
            schedule.step()
            rates += schedule.get_last_lr()
    except Exception as error:
        raise InputError(
            f"`lr_scheduler_type` is {name!r} with `lr_scheduler_kwargs` {given}, which cannot be made "
            f"({_one_line(error)}). Correct `lr_scheduler_kwargs`, or choose cosine."
        ) from error
    if not all(math.isfinite(rate) for rate in rates):
        raise InputError(
            f"`lr_scheduler_kwargs` is {given}, with which learning rates of {name!r} are {rates}, not all of them "
            "finite. Correct it, or leave it unset."
        )


def check_backend(args: TrainingArguments) -> None:
    """
    Raises:
        `ValueError`: PyTorch has no such compiler.
    """
    if args.torch_compile and args.torch_compile_backend != "inductor":
        known = torch.compiler.list_backends()
        if args.torch_compile_backend not in known:
            given = shown("torch_compile_backend", args.torch_compile_backend)
            raise InputError(f"`torch_compile_backend` is {given}; it must be one of {', '.join(known)}.")


def check_trackers(args: TrainingArguments) -> None:
    """
    Raises:
        `OSError`: A tracker of `report_to` is not installed.
    """
    asked = [name for name in args.report_to if name != "flyte"]  # which transformers does not look for
    missing = sorted(set(asked) - set(get_available_reporting_integrations())) if asked else []
    if missing:
        raise EnvironmentFault(
            f"`report_to` is {args.report_to}, but {', '.join(missing)} cannot be used here. Install it, or leave it "
            "out of `report_to`."
        )
