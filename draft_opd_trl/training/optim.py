"""Muon on matrices and AdamW on the rest, as one optimizer the Trainer can drive.

torch ships Muon for matrices only. This pairs it with AdamW so that schedulers, checkpoints and accelerate see a
single optimizer. Knows no models beyond the shapes of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon on matrices and AdamW on the rest, as one optimizer.

    Args:
        params (`Iterable[torch.nn.Parameter]`):
            Trainable parameters; two-dimensional ones go to Muon.
        lr (`float`, *optional*, defaults to `4e-3`):
            Muon's learning rate, scaled to AdamW's update size (`match_rms_adamw`).
        adamw_lr (`float`, *optional*):
            AdamW's; `lr` by default.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Of both.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 4e-3,
        adamw_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        params = [parameter for parameter in params if parameter.requires_grad]
        matrices = [parameter for parameter in params if parameter.ndim == 2]
        others = [parameter for parameter in params if parameter.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if others:
            adamw_lr = lr if adamw_lr is None else adamw_lr
            self.parts.append(torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        # The parts' own groups, not copies: a scheduler that sets `lr` here sets it there.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
