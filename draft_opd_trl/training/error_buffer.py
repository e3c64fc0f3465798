"""Texts whose error positions are worth another look.

Holds token ids, anchors and a loss for each, and draws from them. Knows no models: what the current drafter proposes
there is found where they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.records import DraftBlocks, Rollout


@dataclass
class _Remembered:
    """A text, and the last loss at each anchor whose block held an error; `None` until it has been trained on."""

    tokens: list[int]
    prompt_length: int
    losses: dict[int, float | None]


class ErrorBuffer:
    """
    Texts whose error positions are worth another look, drafted afresh when drawn.

    Holds token ids, positions and a number for each, so old entries cost nothing to keep and never go stale: what the
    *current* drafter proposes there is found when they are drawn.

    Args:
        size (`int`): Texts kept; the oldest leave first.
        by_loss (`bool`, *optional*, defaults to `False`): Draw texts by their mean last loss and anchors by theirs,
            instead of evenly. What has not been trained on yet counts as much as the greatest known loss.
    """

    def __init__(self, size: int, by_loss: bool = False) -> None:
        self.size, self.by_loss = size, by_loss
        self.entries: dict[tuple[int, ...], _Remembered] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, rollout: Rollout, blocks: DraftBlocks) -> None:
        """Remember each text with the anchors of its blocks that held an error; a text seen before is renewed."""
        wrong = blocks.select(blocks.has_error)
        anchors: dict[int, list[int]] = {}
        for text, anchor in zip(wrong.texts.tolist(), wrong.anchors.tolist(), strict=True):
            anchors.setdefault(text, []).append(anchor)
        tokens, lengths = rollout.tokens.tolist(), rollout.lengths.tolist()
        prompt_lengths = rollout.prompt_lengths.tolist()
        for text, exposed in anchors.items():
            ids = tokens[text][: lengths[text]]
            before = self.entries.pop(tuple(ids), None)
            known = before.losses if before is not None else {}
            losses = {anchor: known.get(anchor) for anchor in exposed}
            self.entries[tuple(ids)] = _Remembered(ids, prompt_lengths[text], losses)
        while len(self.entries) > self.size:
            del self.entries[next(iter(self.entries))]

    def note(self, tokens: torch.Tensor, lengths: torch.Tensor, blocks: DraftBlocks, losses: torch.Tensor) -> None:
        """
        Take down what blocks have just cost.

        Args:
            tokens (`torch.LongTensor` of shape `(B, T)`), lengths (`torch.LongTensor` of shape `(B,)`): The texts.
            blocks ([`DraftBlocks`]): Blocks trained on.
            losses (`torch.Tensor` of shape `(N,)`): Weighted loss of each.
        """
        keys = [tuple(ids[:length]) for ids, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        for text, anchor, loss in zip(blocks.texts.tolist(), blocks.anchors.tolist(), losses.tolist(), strict=True):
            entry = self.entries.get(keys[text])
            if entry is not None and anchor in entry.losses:
                entry.losses[anchor] = loss

    def draw(
        self, count: int, num_anchors: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
        """
        Texts to look at again.

        Args:
            count (`int`): Texts; fewer come when fewer are held, and at least one must be.
            num_anchors (`int`): Most anchors of each.
            generator (`torch.Generator`): Decides which, on the CPU.
            device (`torch.device`, *optional*): Where the texts go.

        Returns:
            The texts, and of the error positions remembered the text and the anchor, both `(N,)`.
        """
        held = list(self.entries.values())
        weights = self._weights(held)
        means = torch.stack([weight.mean() for weight in weights])
        picked = torch.multinomial(means, min(count, len(held)), generator=generator).tolist()
        rollout = Rollout.from_ids(
            [held[index].tokens[: held[index].prompt_length] for index in picked],
            [held[index].tokens[held[index].prompt_length :] for index in picked],
            device=device,
        )
        texts, anchors = [], []
        for text, index in enumerate(picked):
            remembered = list(held[index].losses)
            size = min(num_anchors, len(remembered))
            kept = torch.multinomial(weights[index], size, generator=generator).sort().values.tolist()
            texts += [text] * len(kept)
            anchors += [remembered[i] for i in kept]
        return rollout, torch.tensor(texts, device=device), torch.tensor(anchors, device=device)

    def _weights(self, held: list[_Remembered]) -> list[torch.Tensor]:
        """How likely each anchor of each text is drawn, up to a factor."""
        if not self.by_loss:
            return [torch.ones(len(entry.losses)) for entry in held]
        unknown = max((loss for entry in held for loss in entry.losses.values() if loss is not None), default=1.0)
        losses = [[unknown if loss is None else loss for loss in entry.losses.values()] for entry in held]
        return [torch.tensor(weights).clamp(min=1e-6) for weights in losses]

    def state_dict(self) -> dict:
        """Plain values only, in the order in which texts leave."""
        return {"entries": [vars(entry) for entry in self.entries.values()]}

    def load_state_dict(self, state: dict) -> None:
        entries = [_Remembered(**entry) for entry in state["entries"]]
        self.entries = {tuple(entry.tokens): entry for entry in entries}
