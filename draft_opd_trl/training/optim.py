"""Muon on matrices and AdamW on the rest, as one optimizer the Trainer can drive, and as one of its names.

torch ships Muon for matrices only. This pairs it with AdamW so that schedulers, checkpoints and accelerate see a
single optimizer. Knows no models beyond the shapes of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import Trainer, TrainingArguments


# What `optim` calls it, beside the names that transformers has.
MUON = "muon"


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon on matrices and AdamW on the rest, as one optimizer.

    Args:
        params (`Iterable[torch.nn.Parameter]` or `Iterable[dict]`):
            Parameters, or groups of them; of those that are trained, two-dimensional ones go to Muon.
        lr (`float`, *optional*, defaults to `4e-3`):
            Muon's learning rate, scaled to AdamW's update size (`match_rms_adamw`).
        adamw_lr (`float`, *optional*):
            AdamW's; `lr` by default.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Of both, where a group has none of its own.
        betas, eps (*optional*):
            AdamW's.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 4e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        if not all(isinstance(group, dict) for group in groups):
            groups = [{"params": groups}]
        matrices = _chosen(groups, lambda parameter: parameter.ndim == 2)
        others = _chosen(groups, lambda parameter: parameter.ndim != 2)
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            adamw_lr = lr if adamw_lr is None else adamw_lr
            self.parts.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay, betas=betas, eps=eps))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        """
        Have the parts work on this optimizer's own groups and state.

        A scheduler that sets `lr` here then sets it there, and the state has the form that all optimizers' has, which
        is what sharded checkpoints need.
        """
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # as `load_state_dict` does, with groups and state that are new
        self._join()

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _chosen(groups: list[dict[str, Any]], wanted: Any) -> list[dict[str, Any]]:
    """Each group with those of its parameters that are trained and wanted, if there are any."""
    chosen = [
        {**group, "params": [one for one in group["params"] if one.requires_grad and wanted(one)]} for group in groups
    ]
    return [group for group in chosen if group["params"]]


def optimizer_of(args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
    """[`~transformers.Trainer.get_optimizer_cls_and_kwargs`], which knows `MUON` too."""
    if args.optim != MUON:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    return MuonWithAdamW, {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def peak_rate(optim: str, greedy: bool, new: bool = False) -> float:
    """
    The learning rate where none is given.

    Args:
        optim (`str`): Muon's rates are those that the study of recipes chose (docs/source/benchmarks_gains.md); any
            other optimizer gets the papers'.
        greedy (`bool`): Whether the target's text is; drawn text bears less.
        new (`bool`, *optional*, defaults to `False`): For a drafter that has learnt nothing yet, by SFT: the rates
            that the pocket world's drafters and DFlash's own were trained at.
    """
    if new:
        return 4e-3 if optim == MUON else 6e-4
    if optim != MUON:
        return 3e-4
    return 2e-3 if greedy else 1e-3
