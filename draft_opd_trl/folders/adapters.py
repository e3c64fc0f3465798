"""Adapters: put on drafters so that they train, and saved alone; read with exact tensors, and merged so that it shows,
on drafters and targets.

PEFT leaves an adapter's missing tensors at their start, which changes nothing, and passes over the others. So what the
config asks for is compared with what is there before anything is built. Knows no drafter kinds.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..core.records import DraftBlocks
from ..drafters.base import Drafter, check_tensors
from .folder_files import one_line, read_json, read_tensors


Model = TypeVar("Model", bound=PreTrainedModel)
_CONFIG = "adapter_config.json"
# What PEFT and PyTorch raise where a config says what cannot be.
_FAULTS = (AttributeError, ImportError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)
# Fields whose strings PEFT takes for regular expressions; a list of targets is compared as it stands.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save")


class AdaptedDrafter(PeftModel):
    """A drafter with an adapter. It saves what it trains; PEFT would add an adapted head or embedding whole."""

    @classmethod
    def of(cls, drafter: Drafter, config: PeftConfig, revision: str | None = None) -> AdaptedDrafter:
        """
        Args:
            drafter ([`Drafter`]): Its path is what the adapter's folder will name as its base.
            config ([`~peft.PeftConfig`]): Of any method that adapts weights.
            revision (`str`, *optional*): Of the drafter on the Hub.
        """
        config.base_model_name_or_path = drafter.name_or_path
        config.revision = revision or config.revision
        return cls(drafter, config)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(*args, **{**kwargs, "save_embedding_layers": False})


def check_reach(model: PeftModel, drafter: Drafter) -> None:
    """
    Draft a block and see what it depends on.

    Args:
        model ([`~peft.PeftModel`]): The adapter on the drafter.
        drafter ([`Drafter`]): Bound to its target, on one device with it.

    Raises:
        `ValueError`: Parameters that would train nothing, because the drafter reads a weight past its module.
    """
    device, count = drafter.device, drafter.num_draft_tokens
    tokens = torch.zeros((1, count + 2), dtype=torch.long, device=device)
    width = len(drafter.target_layer_ids) * drafter.target.hidden_size
    features = torch.zeros((*tokens.shape, width), dtype=drafter.target.dtype, device=device)
    one = tokens[0, :1]
    blocks = DraftBlocks(one, one + 1, tokens[:, :count], one, one + count)
    states = drafter.draft(features, tokens, blocks).flatten(0, 1)
    logps = drafter.logits(states).float().log_softmax(-1)
    found = [logps[:, 0].sum()]
    if drafter.auxiliary_loss is not None:
        found += [value.sum() for value in drafter.auxiliary_loss(states, logps, logps.detach()).values()]
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(sum(found), list(trained.values()), allow_unused=True)
    if idle := [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]:
        raise InputError(
            f"peft_config adapts what a {drafter.kind} drafter does not draft with, so that {idle} would train "
            "nothing. Leave those modules out of target_modules and modules_to_save."
        )


@dataclass
class Adapter:
    """
    What an adapter's folder holds.

    Args:
        folder (`Path`): Where it lies.
        config ([`~peft.PeftConfig`]): Its method and what it adapts.
        tensors (`dict`): Its weights by name.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, torch.Tensor]

    @property
    def method(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    @property
    def base(self) -> str:
        """Path or id of the model it was trained on, see [`adapter_base`]."""
        return adapter_base(self.folder)


def is_adapter(folder: Path) -> bool:
    return (folder / _CONFIG).is_file()


def adapter_base(folder: Path) -> str:
    """
    Path or id of the model that an adapter was trained on.

    Raises:
        `ValueError`: Its config does not say, or is damaged.
    """
    written = read_json(folder / _CONFIG)
    _check_config(written, folder / _CONFIG)
    if not written.get("base_model_name_or_path"):
        raise InputError(
            f"{folder / _CONFIG} does not name the model it was trained on, as that was an instance without a path. "
            "Write the path to `base_model_name_or_path` there."
        )
    return written["base_model_name_or_path"]


def _may_run_away(pattern: str) -> bool:
    """Whether matching could take for ever: more than a few repeats or choices, or a repeated group."""
    plain = re.sub(r"\[[^\]]*\]", "x", re.sub(r"\\.", "x", pattern, flags=re.S))
    repeats, groups = len(re.findall(r"[*+{?]", plain)), plain.count("(")
    return len(pattern) > 200 or repeats > 4 or groups > 4 or re.search(r"\)[*+{]", plain) is not None


def _patterns(name: str, value: Any) -> list[Any]:
    """The regular expressions in a field, or what stands in their place."""
    if value is None or (name == "target_modules" and isinstance(value, list)):
        return []
    return list(value) if isinstance(value, (list, dict)) else [value]


def _check_config(written: dict[str, Any], file: Path) -> None:
    """Refuse by name what PEFT would follow into a hang or another adapter."""
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(written.get(name), str | None):
            raise InputError(f"{file}: {name} is {str(written[name])[:80]!r}, but must be a string. Correct it there.")
    for name in _PATTERNS:
        for pattern in _patterns(name, written.get(name)):
            if not isinstance(pattern, str) or _may_run_away(pattern):
                raise InputError(
                    f"{file}: {name} holds {str(pattern)[:80]!r}, which is no name or a pattern whose matching may "
                    "never end. List the names of the modules instead."
                )
    # Another architecture, and a module to import by name.
    for name in ("layer_replication", "megatron_config"):
        if written.get(name):
            raise InputError(f"{file}: {name} is set, which no adapter here uses. Remove it there.")
    method = written.get("peft_type")
    if not isinstance(method, str) or method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{file}: peft_type is {str(method)[:80]!r}, which PEFT does not know. Correct it there.")
    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method]):
        value, usual = written.get(field.name), field.default
        if value is None or not isinstance(usual, bool | int | float):
            continue
        # A scale beyond that would drown the weights it is added to.
        high = 10**5 if field.name.endswith("alpha") else 10**9
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < high
        low = 0 if field.name.endswith("alpha") or field.name == "r" else -math.inf
        if not isinstance(value, bool) if isinstance(usual, bool) else not (number and value > low):
            wanted = (
                "true or false"
                if isinstance(usual, bool)
                else "a number" + (f" above 0 and below {high}" if low == 0 else "")
            )
            raise InputError(
                f"{file}: {field.name} is {str(value)[:80]!r}, but must be {wanted}. Correct it there, or save the "
                "adapter again."
            )


def read_adapter(folder: Path) -> Adapter:
    """
    Raises:
        `FileNotFoundError`: No weights there.
        `ValueError`: The config or the weights are damaged, or of a method that adapts no weights.
    """
    file = folder / _CONFIG
    written = read_json(file)
    _check_config(written, file)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        prompts = config.is_prompt_learning
    except _FAULTS as error:
        raise InputError(f"{file} is no adapter's config ({one_line(error)}). Save the adapter again.") from error
    if prompts:
        raise InputError(
            f"{file}: {written['peft_type']} trains a prompt, and no weights. Give one that adapts weights."
        )
    return Adapter(folder, config, read_tensors(folder, "adapter_model", "adapter_model"))


def _mark(parameter: torch.Tensor) -> tuple[float, float]:
    """Two numbers that a change of the values changes, without a copy of them."""
    values = parameter.detach()
    return values.sum(dtype=torch.float64).item(), values.norm(dtype=torch.float64).item()


def merge(model: Model, adapter: Adapter) -> Model:
    """
    A drafter or a target with the adapter in its weights.

    Raises:
        `ValueError`: A tensor of the adapter is missing, unexpected, misshapen, of the wrong dtype or not finite; or
            it says something, and merging changed nothing.
    """
    folder, tensors = adapter.folder, adapter.tensors
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        # Without memory first: a rank of a billion costs nothing until it is compared with the file.
        with torch.device("meta"):
            bare = type(model)(copy.deepcopy(model.config))
        shape = PeftModel(bare, copy.deepcopy(adapter.config), low_cpu_mem_usage=True)
        expected = get_peft_model_state_dict(shape, save_embedding_layers=False)
        check_tensors(expected, tensors, folder)
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise InputError(f"{folder} holds values that are not finite in {bad}; the adapter is damaged.")
        before = {name: _mark(parameter) for name, parameter in model.named_parameters()}
        adapted = PeftModel(model, adapter.config)
        set_peft_model_state_dict(adapted, tensors)
        merged = adapted.merge_and_unload(safe_merge=True)
    except InputError:
        raise
    except _FAULTS as error:
        raise InputError(
            f"The adapter in {folder} cannot be put on {adapter.base!r} ({one_line(error)}). Is this the model it was "
            "trained on? Otherwise save the adapter again."
        ) from error
    says = any(re.search("lora_(embedding_)?B", name) and bool(tensor.any()) for name, tensor in tensors.items())
    if says and all(before[name] == _mark(parameter) for name, parameter in merged.named_parameters()):
        raise InputError(
            f"Merging the adapter in {folder} changed no weight of {adapter.base!r}, though it is not zero: is "
            f"lora_alpha in {_CONFIG} 0, or the dtype too coarse?"
        )
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(trainable[name])
    return merged.eval()
