"""The contract every drafter keeps.

Speculation, replay and training reach a drafter only through these members, so a third architecture is one file and
one line in `DRAFTERS`. Knows nothing of rollouts, losses or where anchors come from.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..records import DraftBlocks
from ..sampling import Chooser
from ..target import Target


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, whatever it was before outside, also after an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass
class Proposal:
    """
    Blocks drafted at a grid of anchors.

    Args:
        tokens (`torch.LongTensor` of shape `(B, M, K)`):
            Target token ids.
        probs (`torch.Tensor` of shape `(B, M, K, V)`, *optional*):
            Distributions they were drawn from, over the target's vocabulary; `None` for argmax proposals.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None


def check_keys(expected: dict[str, torch.Size], found: dict[str, torch.Size], where: object) -> None:
    """
    Raises:
        `ValueError`: A tensor is missing, unexpected or of the wrong shape, by name.
    """
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != tuple(found[name])
    ]
    if missing or unexpected or wrong:
        raise ValueError(
            f"The tensors in {where} are not this drafter's. Missing: {missing or 'none'}. Unexpected: "
            f"{unexpected or 'none'}. Wrong shape: {wrong or 'none'}. Re-export it in its published layout."
        )


class Drafter(PreTrainedModel, ABC):
    """
    A small model that proposes `num_draft_tokens` tokens after an anchor from tapped target states.

    Attributes:
        kind (`str`): Key in `DRAFTERS`.
        vocab_map (`torch.LongTensor` of shape `(DV,)`, *optional*): Draft id → target id; `None` when they are equal.
    """

    kind: str
    vocab_map: torch.Tensor | None = None
    main_input_name = "features"
    supports_gradient_checkpointing = True
    # Set by transformers' `activation_checkpointing_enable`; [`replay`] then keeps no activations of its blocks.
    gradient_checkpointing = False
    _target: Target | None = None

    # -- to be provided by each architecture ---------------------------------------------------------------------

    @property
    @abstractmethod
    def target_layer_ids(self) -> list[int]:
        """Target layers read, counted from 0, as outputs of those layers."""

    @property
    @abstractmethod
    def num_draft_tokens(self) -> int:
        """K, proposals a block."""

    @property
    @abstractmethod
    def sft_decay(self) -> float:
        """Weight of slot k in SFT is `sft_decay ** (k - 1)`, as the architecture's recipe has it."""

    @abstractmethod
    def check_target(self, target: Target) -> None:
        """Raise `ValueError` naming every way in which this drafter does not fit `target`."""

    @abstractmethod
    def start(self, batch_size: int, max_length: int) -> Any:
        """An empty drafting state for texts of up to `max_length` positions."""

    @abstractmethod
    def extend(
        self,
        state: Any,
        features: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:
        """
        Read target features of committed positions into the state, in place.

        Args:
            features (`torch.Tensor` of shape `(R, Q, F)`): Tapped states.
            positions (`torch.LongTensor` of shape `(R, Q)`): Where they stand. Positions past the committed text may
                be given; what they leave behind is overwritten before it becomes visible.
            tokens (`torch.LongTensor` of shape `(R, S)`): The texts so far, by position.
            rows (`torch.LongTensor` of shape `(R,)`, *optional*): State rows; all by default.
        """

    @abstractmethod
    def propose(
        self, state: Any, tokens: torch.Tensor, anchors: torch.Tensor, limit: int, choose: Chooser
    ) -> Proposal:
        """
        Draft a block at each anchor of a grid; nothing is kept in the state.

        Args:
            tokens, anchors (`torch.LongTensor` of shape `(B, M)`): Anchor tokens and their positions.
            limit (`int`): Positions of the state to look at, at least the largest anchor.
            choose ([`Chooser`]): Turns logits into proposals.
        """

    @abstractmethod
    def replay(self, features: torch.Tensor, tokens: torch.Tensor, blocks: DraftBlocks) -> torch.Tensor:
        """
        The same drafting with gradients, for many blocks of whole texts at once.

        Args:
            features (`torch.Tensor` of shape `(B, T, F)`): Tapped states of the texts.
            tokens (`torch.LongTensor` of shape `(B, T)`): The texts.
            blocks ([`DraftBlocks`]): Blocks to draft; drafters that read their own proposals read `draft_tokens`.

        Returns:
            `torch.Tensor` of shape `(N, K, H)`: states that [`output_weight`] turns into draft logits.
        """

    @abstractmethod
    def output_weight(self) -> torch.Tensor:
        """Head `(DV, H)` that turns states into draft logits."""

    # -- folders: the layout a class writes, and the other layouts it can read ----------------------------------------

    @classmethod
    def recognises(cls, config: dict[str, Any]) -> bool:
        """Whether a folder with this `config.json` holds a drafter of this class."""
        return cls.__name__ in (config.get("architectures") or [])

    @classmethod
    def canonical_tensors(cls, tensors: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """A folder's tensors under the names this class gives them; what only they tell is settled in `config`."""
        return tensors

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write the folder, whole or not at all.

        Raises:
            `ValueError`: `state_dict` lacks a tensor, or holds one that is not the drafter's, by name.
        """
        if state_dict is not None:
            check_keys(
                *({k: v.shape for k, v in state.items()} for state in (self.state_dict(), state_dict)),
                "the state to save",
            )
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push the folder, with a card of its own; see [`~draft_opd_trl.hub.push_drafter`]."""
        # By name: the copy of this file that travels with a checkpoint stands without the package.
        return importlib.import_module("draft_opd_trl.hub").push_drafter(self, repo_id, **kwargs)

    # -- shared --------------------------------------------------------------------------------------------------

    def bind(self, target: Target) -> Drafter:
        """
        Lend the target's embedding and head; they never become parameters of the drafter.

        Raises:
            `ValueError`: The two do not fit.
        """
        self.check_target(target)
        self._target = target
        return self

    @property
    def target(self) -> Target:
        if self._target is None:
            raise RuntimeError(f"This {self.kind} drafter borrows from its target: call `drafter.bind(target)` first.")
        return self._target

    def to_target_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Draft vocabulary ids → target ids."""
        return draft_ids if self.vocab_map is None else self.vocab_map[draft_ids]
