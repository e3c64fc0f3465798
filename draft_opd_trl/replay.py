"""Text + drafter → what verification would have said of the current drafter.

Speculation is lossless, so a text does not depend on the drafter that sped it up, and what the *current* drafter
would have proposed along it, and what verification would have said, can be found without decoding. Holds that
replay, for argmax proposals and for drawn ones. Knows no optimizer and no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .drafters.base import Drafter
from .packing import pack_by_text
from .records import DraftBlocks, Rollout, num_valid_slots
from .sampling import Chooser, probabilities
from .sampling_params import SamplingParams
from .target import Target
from .verification import couple_to_text, judge_against_text
from .vocabulary import to_draft_ids


ARGMAX = Chooser()
# Anchors of a text drafted at once: all logits of a block are held while it is drafted.
ANCHORS_AT_ONCE = 16
# Share of blocks that are not wholly accepted, below which looking ahead along one chain beats several chains.
MOSTLY_WHOLE = 0.25


def slot_labels(tokens: torch.Tensor, rows: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int):
    """Text tokens at the K slots after each anchor: `(N, K)`; slots outside the tensor repeat its last column."""
    slots = torch.arange(1, num_draft_tokens + 1, device=tokens.device)
    return tokens[rows[:, None], (anchors[:, None] + slots).clamp(max=tokens.shape[1] - 1)]


def text_blocks(rollout: Rollout, rows: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int) -> DraftBlocks:
    """Blocks that propose the text itself: everything accepted. Teacher forcing (SFT) is training on these."""
    labels = slot_labels(rollout.tokens, rows, anchors, num_draft_tokens)
    num_valid = num_valid_slots(anchors, rollout.lengths[rows], num_draft_tokens)
    return DraftBlocks(rows, anchors, labels, num_valid, num_valid)


def grid_of(rows: torch.Tensor, anchors: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed anchors `(N,)` as a grid `(B, M)` and the bool `(B, M)` of its filled cells."""
    columns, width = pack_by_text(rows, batch)
    grid = anchors.new_zeros((batch, width))
    live = torch.zeros((batch, width), dtype=torch.bool, device=anchors.device)
    grid[rows, columns] = anchors
    live[rows, columns] = True
    return grid, live


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

    def select(self, index: torch.Tensor) -> Coupling:
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
        self.row_index = torch.arange(len(rollout), device=anchors.device)[:, None]
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
        states = self.coupling.states[self.row_index, before]
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
            self.coupling.uniforms[self.row_index, self.anchors, self.slot],
        )
        self.on_text &= accepted
        self.slot += 1
        return drafted


@torch.no_grad()
def draft_at(
    drafter: Drafter,
    state: object,
    rollout: Rollout,
    anchors: torch.Tensor,
    live: torch.Tensor,
    coupling: Coupling | None = None,
) -> DraftBlocks:
    """
    Draft afresh at chosen anchors and judge the proposals against the text.

    Args:
        drafter ([`Drafter`]): Bound to its target.
        state: Its drafting state, holding the texts.
        rollout ([`Rollout`]): The texts.
        anchors (`torch.LongTensor` of shape `(B, M)`): A grid of anchors.
        live (`torch.BoolTensor` of shape `(B, M)`): Cells that hold one.
        coupling ([`Coupling`], *optional*): Draw proposals; they are the drafter's argmax by default.

    Returns:
        [`DraftBlocks`] of the live cells, row by row.
    """
    parts = []
    for part in anchors.split(ANCHORS_AT_ONCE, dim=1):
        choose = ARGMAX if coupling is None else TextChooser(coupling, rollout, part, drafter.vocab_map)
        tokens = rollout.tokens.gather(1, part)
        parts.append(drafter.propose(state, tokens, part, rollout.tokens.shape[1], choose).tokens)
    proposed = torch.cat(parts, dim=1)
    rows, columns = live.nonzero().T
    chosen = anchors[rows, columns]
    labels = slot_labels(rollout.tokens, rows, chosen, drafter.num_draft_tokens)
    num_valid = num_valid_slots(chosen, rollout.lengths[rows], drafter.num_draft_tokens)
    draft_tokens = proposed[rows, columns]
    return DraftBlocks(rows, chosen, draft_tokens, judge_against_text(draft_tokens, labels, num_valid), num_valid)


@torch.no_grad()
def read_text(drafter: Drafter, rollout: Rollout, features: torch.Tensor) -> object:
    """A drafting state that holds whole texts."""
    batch, length = rollout.tokens.shape
    state = drafter.start(batch, length)
    positions = torch.arange(length, device=rollout.tokens.device).expand(batch, -1)
    drafter.extend(state, features, positions, rollout.tokens)
    return state


@torch.no_grad()
def replay_text(
    drafter: Drafter,
    rollout: Rollout,
    features: torch.Tensor,
    num_chains: int = 8,
    coupling: Coupling | None = None,
) -> DraftBlocks:
    """
    The blocks real speculation with this drafter would have judged on these texts, without decoding.

    An argmax proposal is accepted exactly where the text agrees, at any rollout temperature; drawn proposals come
    from their law given the text, so they equal speculation's in law. What happens at an anchor depends on nothing
    but the anchor, so several chains run side by side from spread-out positions of one text and stop where another
    has been; the chain from the completion's first token is then read off the outcomes. Chains of a drafter that is
    mostly right step evenly and seldom meet; then the first goes on alone, and the anchors that whole blocks would
    lead to are drafted ahead. Exact for any `num_chains`; more mean fewer rounds and some wasted blocks.

    Args:
        drafter ([`Drafter`]): Bound to its target.
        rollout ([`Rollout`]): Texts the target wrote.
        features (`torch.Tensor` of shape `(B, T, F)`): Tapped states of the texts.
        num_chains (`int`, *optional*, defaults to `8`): Anchors of each text drafted at once.
        coupling ([`Coupling`], *optional*): Draw proposals; they are the drafter's argmax by default.

    Returns:
        [`DraftBlocks`] in text order.
    """
    batch, length = rollout.tokens.shape
    device = rollout.tokens.device
    state = read_text(drafter, rollout, features)
    last = rollout.lengths - 1  # an anchor at the last token has nothing left to propose
    share = torch.arange(num_chains, device=device) / num_chains
    anchors = rollout.prompt_lengths[:, None] + (share * (last - rollout.prompt_lengths)[:, None]).long()
    accepted_at = torch.full((batch, length), -1, dtype=torch.long, device=device)
    drafts_at = torch.zeros((batch, length, drafter.num_draft_tokens), dtype=torch.long, device=device)
    live = anchors < last[:, None]
    ahead = torch.zeros(1, dtype=torch.long, device=device)
    while bool(live.any()):
        # Drop finished chains, so that a few long ones do not pay for all.
        width = int(live.sum(1).max())
        order = torch.argsort(live.long(), dim=1, descending=True, stable=True)[:, :width]
        anchors, live = anchors.gather(1, order), live.gather(1, order)
        grid = (anchors[..., None] + ahead).flatten(1)
        wanted = live.repeat_interleave(len(ahead), dim=1) & (grid < last[:, None])
        wanted &= accepted_at.gather(1, grid.clamp(max=length - 1)) < 0
        blocks = draft_at(drafter, state, rollout, torch.where(wanted, grid, 0), wanted, coupling)
        accepted_at[blocks.texts, blocks.anchors] = blocks.num_accepted
        drafts_at[blocks.texts, blocks.anchors] = blocks.draft_tokens
        # Asked of several chains alone: the answer is a host sync.
        broken = 1.0
        if len(ahead) == 1 < num_chains:
            broken = float((blocks.num_accepted < drafter.num_draft_tokens).float().mean())
        if broken < MOSTLY_WHOLE:
            run = int(1 / max(broken, 1 / num_chains))  # whole blocks to the next broken one, on average
            ahead = torch.arange(run, device=device) * (drafter.num_draft_tokens + 1)
            anchors, live = anchors[:, :1], rollout.prompt_lengths[:, None] < last[:, None]
            anchors = torch.where(live, rollout.prompt_lengths[:, None], anchors)
        for _ in ahead:
            found = accepted_at.gather(1, anchors.clamp(max=length - 1))
            anchors = torch.where(live & (found >= 0), anchors + found + 1, anchors)
            live = live & (anchors < last[:, None])
        if len(ahead) == 1:
            live &= accepted_at.gather(1, anchors.clamp(max=length - 1)) < 0
            # Two chains that land on one anchor in the same round are one chain from there on.
            live &= ~(((anchors[:, :, None] == anchors[:, None, :]) & live[:, None, :]).tril(-1).any(-1))
    return _read_off(rollout, accepted_at, drafts_at)


def _read_off(rollout: Rollout, accepted_at: torch.Tensor, drafts_at: torch.Tensor) -> DraftBlocks:
    """Follow the chain from each completion's first token through the outcomes."""
    rows, anchors = [], []
    starts, stops = rollout.prompt_lengths.tolist(), (rollout.lengths - 1).tolist()
    for row, outcomes in enumerate(accepted_at.tolist()):
        anchor = starts[row]
        while anchor < stops[row]:
            rows.append(row)
            anchors.append(anchor)
            anchor += outcomes[anchor] + 1
    device = accepted_at.device
    row_index = torch.tensor(rows, dtype=torch.long, device=device)
    anchor_index = torch.tensor(anchors, dtype=torch.long, device=device)
    num_valid = num_valid_slots(anchor_index, rollout.lengths[row_index], drafts_at.shape[-1])
    return DraftBlocks(
        row_index, anchor_index, drafts_at[row_index, anchor_index], accepted_at[row_index, anchor_index], num_valid
    )
