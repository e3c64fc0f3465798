"""Which anchors of a text to draft next, until the chain of blocks from its first token on is known.

Pure tensors: anchors and outcomes. Knows no models and not how a block is drafted.
"""

from __future__ import annotations

import torch

from ..core.records import DraftBlocks, Rollout, num_valid_slots


# Share of blocks that are not wholly accepted, below which looking ahead along one chain beats several chains.
MOSTLY_WHOLE = 0.25


class Chains:
    """
    The search for the blocks that speculation would have had along given texts.

    What happens at an anchor depends on nothing but the anchor, so several chains run side by side from spread-out
    positions of one text and stop where another has been; the chain from the completion's first token is then read
    off the outcomes. Chains of a drafter that is mostly right step evenly and seldom meet; then the first goes on
    alone, and the anchors that whole blocks would lead to are drafted ahead. Exact for any `num_chains`; more mean
    fewer rounds and some wasted blocks.

    Args:
        rollout ([`Rollout`]): The texts.
        num_draft_tokens (`int`): K.
        num_chains (`int`): Of each text, at the start.
    """

    def __init__(self, rollout: Rollout, num_draft_tokens: int, num_chains: int) -> None:
        self.rollout, self.num_draft_tokens, self.num_chains = rollout, num_draft_tokens, num_chains
        batch, length = rollout.tokens.shape
        device = rollout.tokens.device
        self.first, self.last = rollout.prompt_lengths, rollout.lengths - 1  # nothing is left to propose at the last
        share = torch.arange(num_chains, device=device) / num_chains
        self.anchors = self.first[:, None] + (share * (self.last - self.first)[:, None]).long()
        self.live = self.anchors < self.last[:, None]
        # Whole blocks that each chain is followed at once, as tokens beyond its anchor.
        self.ahead = torch.zeros(1, dtype=torch.long, device=device)
        self.accepted_at = torch.full((batch, length), -1, dtype=torch.long, device=device)
        self.drafts_at = torch.zeros((batch, length, num_draft_tokens), dtype=torch.long, device=device)

    @property
    def running(self) -> bool:
        """Whether a chain has not met another or the end of its text; a host sync."""
        return bool(self.live.any())

    def next_anchors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A grid of anchors `(B, M)` to draft now, and the bool `(B, M)` of the cells that hold one."""
        # Drop finished chains, so that a few long ones do not pay for all.
        width = int(self.live.sum(1).max())
        order = torch.argsort(self.live.long(), dim=1, descending=True, stable=True)[:, :width]
        self.anchors, self.live = self.anchors.gather(1, order), self.live.gather(1, order)
        grid = (self.anchors[..., None] + self.ahead).flatten(1)
        wanted = self.live.repeat_interleave(len(self.ahead), dim=1) & (grid < self.last[:, None])
        wanted &= self._found(grid) < 0
        return torch.where(wanted, grid, 0), wanted

    def note(self, blocks: DraftBlocks) -> None:
        """Take down what came of the anchors, and move every chain on."""
        self.accepted_at[blocks.texts, blocks.anchors] = blocks.num_accepted
        self.drafts_at[blocks.texts, blocks.anchors] = blocks.draft_tokens
        if len(self.ahead) == 1 < self.num_chains:
            # Asked of several chains alone: the answer is a host sync.
            broken = float((blocks.num_accepted < self.num_draft_tokens).float().mean())
            if broken < MOSTLY_WHOLE:
                self._look_ahead(int(1 / max(broken, 1 / self.num_chains)))
        for _ in self.ahead:
            found = self._found(self.anchors)
            self.anchors = torch.where(self.live & (found >= 0), self.anchors + found + 1, self.anchors)
            self.live = self.live & (self.anchors < self.last[:, None])
        if len(self.ahead) == 1:
            self._stop_where_another_has_been()

    def _look_ahead(self, run: int) -> None:
        """From now on one chain a text, from its start, of as many blocks at once as are whole on average."""
        self.ahead = torch.arange(run, device=self.anchors.device) * (self.num_draft_tokens + 1)
        self.live = self.first[:, None] < self.last[:, None]
        self.anchors = torch.where(self.live, self.first[:, None], self.anchors[:, :1])

    def _stop_where_another_has_been(self) -> None:
        self.live &= self._found(self.anchors) < 0
        # Two chains that land on one anchor in the same round are one chain from there on.
        same = (self.anchors[:, :, None] == self.anchors[:, None, :]) & self.live[:, None, :]
        self.live &= ~same.tril(-1).any(-1)

    def _found(self, anchors: torch.Tensor) -> torch.Tensor:
        """What was accepted at anchors `(B, M)`; −1 where nothing was drafted yet."""
        return self.accepted_at.gather(1, anchors.clamp(max=self.accepted_at.shape[1] - 1))

    def blocks(self) -> DraftBlocks:
        """The chain from each completion's first token, followed through the outcomes."""
        texts, anchors = [], []
        starts, stops = self.first.tolist(), self.last.tolist()
        for text, outcomes in enumerate(self.accepted_at.tolist()):
            anchor = starts[text]
            while anchor < stops[text]:
                texts.append(text)
                anchors.append(anchor)
                anchor += outcomes[anchor] + 1
        place = torch.tensor([texts, anchors], dtype=torch.long, device=self.anchors.device)
        num_valid = num_valid_slots(place[1], self.rollout.lengths[place[0]], self.num_draft_tokens)
        return DraftBlocks(*place, self.drafts_at[tuple(place)], self.accepted_at[tuple(place)], num_valid)
