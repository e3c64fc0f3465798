"""Text + drafter → what verification would have said of the current drafter.

Speculation is lossless, so a text does not depend on the drafter that sped it up, and what the *current* drafter
would have proposed along it, and what verification would have said, can be found without decoding. Holds that
replay, for argmax proposals and for drawn ones. Knows no optimizer and no loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.cache import PositionCache
from ..core.packing import pack_by_text
from ..core.records import DraftBlocks, Rollout, num_valid_slots, slot_labels
from ..core.sampling import Chooser
from ..core.target import Target
from ..core.verification import judge_against_text
from ..drafters.base import Drafter
from .chains import Chains
from .coupling import Coupling, TextChooser


class TextJudge(Chooser):
    """
    Argmax proposals as far as a text agrees with them.

    A drafter that knows the states of all slots beforehand is asked for runs of 1, 1, 2, 4, … slots, each only at
    blocks that agreed on all before; one that goes slot by slot, for every proposal.

    Args:
        rollout ([`Rollout`]): The texts.
        anchors (`torch.LongTensor` of shape `(B, M)`): A grid of anchors.
        live (`torch.BoolTensor` of shape `(B, M)`): Cells that hold one.
        drafter ([`Drafter`]): Whose proposals they are.

    Attributes:
        unread (`torch.BoolTensor` of shape `(B, M, K)`, *optional*): Slots that were not asked for; what
            `propose` gives there is not the drafter's.
    """

    def __init__(self, rollout: Rollout, anchors: torch.Tensor, live: torch.Tensor, drafter: Drafter) -> None:
        super().__init__()
        self.rollout, self.anchors, self.live, self.drafter = rollout, anchors, live, drafter
        self.unread: torch.Tensor | None = None

    def read(self, states: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, None]:
        """Draft ids `(B, M, K)` from states of all slots; see [`Drafter.proposal_of`]."""
        texts, columns = self.live.nonzero(as_tuple=True)
        num_slots, start, stop = states.shape[2], 0, 1
        proposed = self.anchors.new_zeros(states.shape[:3])
        self.unread = torch.ones_like(proposed, dtype=torch.bool)
        while start < num_slots and len(texts):
            run = (texts, columns, slice(start, stop))
            proposed[run] = drafted = logits(states[run]).argmax(-1)
            self.unread[run] = False
            labels = slot_labels(self.rollout.tokens, texts, self.anchors[texts, columns], stop)[:, start:]
            agreed = (self.drafter.to_target_ids(drafted) == labels).all(-1).nonzero()[:, 0]  # once: it is waited for
            texts, columns = texts[agreed], columns[agreed]
            start, stop = stop, min(2 * stop, num_slots)
        return proposed, None


# Anchors of a text drafted at once: all logits of a block are held while it is drafted.
ANCHORS_AT_ONCE = 16


def text_blocks(rollout: Rollout, texts: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int) -> DraftBlocks:
    """Blocks that propose the text itself: everything accepted. Teacher forcing (SFT) is training on these."""
    labels = slot_labels(rollout.tokens, texts, anchors, num_draft_tokens)
    num_valid = num_valid_slots(anchors, rollout.lengths[texts], num_draft_tokens)
    return DraftBlocks(texts, anchors, labels, num_valid, num_valid)


def grid_of(texts: torch.Tensor, anchors: torch.Tensor, num_texts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed anchors `(N,)` as a grid `(B, M)` and the bool `(B, M)` of its filled cells."""
    columns, width = pack_by_text(texts, num_texts)
    grid = anchors.new_zeros((num_texts, width))
    live = torch.zeros((num_texts, width), dtype=torch.bool, device=anchors.device)
    grid[texts, columns] = anchors
    live[texts, columns] = True
    return grid, live


@torch.no_grad()
def draft_at(
    drafter: Drafter,
    state: object,
    rollout: Rollout,
    anchors: torch.Tensor,
    live: torch.Tensor,
    coupling: Coupling | None = None,
    judge_only: bool = False,
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
        judge_only (`bool`, *optional*, defaults to `False`): Leave out argmax proposals that decide nothing where that
            saves logits: −1 stands for some behind the first rejected slot.

    Returns:
        [`DraftBlocks`] of the live cells, text by text.
    """
    parts = []
    for start in range(0, anchors.shape[1], ANCHORS_AT_ONCE):
        part, held = (grid[:, start : start + ANCHORS_AT_ONCE] for grid in (anchors, live))
        choose = Chooser()
        if coupling is not None:
            choose = TextChooser(coupling, rollout, part, drafter.vocab_map)
        elif judge_only:
            choose = TextJudge(rollout, part, held, drafter)
        tokens = rollout.tokens.gather(1, part)
        parts.append(drafter.propose(state, tokens, part, rollout.tokens.shape[1], choose).tokens)
        if isinstance(choose, TextJudge) and choose.unread is not None:
            parts[-1] = parts[-1].masked_fill(choose.unread, -1)
    proposed = torch.cat(parts, dim=1)
    texts, columns = live.nonzero().T
    text = text_blocks(rollout, texts, anchors[texts, columns], drafter.num_draft_tokens)
    draft_tokens = proposed[texts, columns]
    num_accepted = judge_against_text(draft_tokens, text.draft_tokens, text.num_valid)
    return DraftBlocks(texts, text.anchors, draft_tokens, num_accepted, text.num_valid)


def judging_states(
    target: Target,
    rollout: Rollout,
    blocks: DraftBlocks,
    states: torch.Tensor,
    cache: PositionCache | None,
    block_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The target's states that judge each slot, given the *proposals* before it.

    Args:
        target ([`Target`]): Scores what stands behind rejected proposals.
        rollout ([`Rollout`]): The texts.
        blocks ([`DraftBlocks`]): Blocks on them.
        states (`torch.Tensor` of shape `(B, T, H)`): Of the texts, before the head.
        cache ([`PositionCache`], *optional*): Holding the texts; needed without `block_states`.
        block_states (`torch.Tensor` of shape `(N, K, H)`, *optional*): What verification kept; saves scoring.

    Returns:
        `torch.Tensor` of shape `(N, K, H)`.
    """
    if block_states is None:
        block_states = target.score_blocks(rollout.tokens, blocks, cache)
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.texts.device)
    # Up to the first rejected slot the drafted prefix is the text.
    on_text = (slots <= blocks.num_accepted[:, None])[..., None]
    return torch.where(on_text, blocks.text_states(states), block_states)


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
    judge_only: bool = False,
) -> DraftBlocks:
    """
    The blocks real speculation with this drafter would have judged on these texts, without decoding.

    An argmax proposal is accepted exactly where the text agrees, at any rollout temperature; drawn proposals come
    from their law given the text, so they equal speculation's in law. Exact for any `num_chains`; see [`Chains`].

    Args:
        drafter ([`Drafter`]): Bound to its target.
        rollout ([`Rollout`]): Texts the target wrote.
        features (`torch.Tensor` of shape `(B, T, F)`): Tapped states of the texts.
        num_chains (`int`, *optional*, defaults to `8`): Anchors of each text drafted at once.
        coupling ([`Coupling`], *optional*): Draw proposals; they are the drafter's argmax by default.
        judge_only (`bool`, *optional*, defaults to `False`): As in [`draft_at`].

    Returns:
        [`DraftBlocks`] in text order.
    """
    state = read_text(drafter, rollout, features)
    chains = Chains(rollout, drafter.num_draft_tokens, num_chains)
    while chains.running:
        anchors, live = chains.next_anchors()
        chains.note(draft_at(drafter, state, rollout, anchors, live, coupling, judge_only))
    return chains.blocks()
