"""Drawn proposals along a given text: each from its law, given what verification let stand there.

Holds what such draws take, and the chooser that drafters are handed for them. The law is `verification.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.records import Rollout
from ..core.sampling import probabilities
from ..core.sampling_params import SamplingParams
from ..core.target import Target
from ..core.verification import couple_to_text
from ..core.vocabulary import to_draft_ids


@dataclass(frozen=True)
class Coupling:
    """
    What drawing proposals along given texts takes (temperature > 0).

    Args:
        target ([`Target`]): Its head tells what the text was drawn from.
        states (`torch.Tensor` of shape `(B, T, H)`): Target states of the texts, before the head.
        sampling ([`SamplingParams`]): The law of both the text and the proposals.
        uniforms (`torch.Tensor` of shape `(B, T, K, 2)`): In [0, 1), for each anchor and slot, so that what is drawn
            at an anchor depends on nothing but the anchor.
    """

    target: Target
    states: torch.Tensor
    sampling: SamplingParams
    uniforms: torch.Tensor

    def select(self, index: torch.Tensor | slice) -> Coupling:
        """The same for texts at `index`."""
        return Coupling(self.target, self.states[index], self.sampling, self.uniforms[index])


class TextChooser:
    """
    Keeps the contract of [`Chooser`]: draws each slot's proposal from its law given the text, while earlier ones of
    the block were accepted, and freely from the drafter's after the first rejection or the text's end.

    Args:
        coupling ([`Coupling`]): Of the texts.
        rollout ([`Rollout`]): The texts.
        anchors (`torch.LongTensor` of shape `(B, M)`): A grid of anchors.
        vocab_map (`torch.LongTensor` of shape `(DV,)`, *optional*): The drafter's.
    """

    def __init__(
        self, coupling: Coupling, rollout: Rollout, anchors: torch.Tensor, vocab_map: torch.Tensor | None
    ) -> None:
        self.coupling, self.rollout, self.anchors, self.vocab_map = coupling, rollout, anchors, vocab_map
        self.text_index = torch.arange(len(rollout), device=anchors.device)[:, None]
        self.on_text = torch.ones_like(anchors, dtype=torch.bool)
        self.slot = 0

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        if logits.dim() == 3:
            return self._draw(logits), None
        return torch.stack([self._draw(slot_logits) for slot_logits in logits.unbind(2)], dim=-1), None

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Draft ids `(B, M)` for the next slot."""
        before = self.anchors + self.slot
        self.on_text &= before < self.rollout.lengths[:, None] - 1
        before = before.clamp(max=self.rollout.tokens.shape[1] - 2)
        labels = self.rollout.tokens.gather(1, before + 1)
        states = self.coupling.states[self.text_index, before]
        target_probs = probabilities(self.coupling.target.logits(states), self.coupling.sampling)
        bound = self.on_text
        if self.vocab_map is not None:
            target_probs = target_probs[..., self.vocab_map]
            labels, inside = to_draft_ids(labels, self.vocab_map)
            bound = bound & inside
        drafted, accepted = couple_to_text(
            probabilities(logits, self.coupling.sampling),
            target_probs * self.on_text[..., None],
            torch.where(bound, labels, -1),
            self.coupling.uniforms[self.text_index, self.anchors, self.slot],
        )
        self.on_text &= accepted
        self.slot += 1
        return drafted
