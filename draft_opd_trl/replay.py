"""Text + drafter → what verification would have said; blocks → the batch a step trains on.

Speculation is lossless, so a text does not depend on the drafter that sped it up, and what the *current* drafter
would have proposed along it, and what verification would have said, can be found without decoding. Holds that
replay, the choice of blocks, the two streams' weights and the buffer of error positions. Knows no optimizer.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass

import torch

from .drafters.base import Drafter
from .records import DraftBlocks, ReplayBatch, Rollout, num_valid_slots
from .sampling import Chooser
from .target import Target
from .verification import judge_against_text


ARGMAX = Chooser()


def slot_labels(tokens: torch.Tensor, rows: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int):
    """Text tokens at the K slots after each anchor: `(N, K)`; slots outside the tensor repeat its last column."""
    slots = torch.arange(1, num_draft_tokens + 1, device=tokens.device)
    return tokens[rows[:, None], (anchors[:, None] + slots).clamp(max=tokens.shape[1] - 1)]


def text_blocks(rollout: Rollout, rows: torch.Tensor, anchors: torch.Tensor, num_draft_tokens: int) -> DraftBlocks:
    """Blocks that propose the text itself: everything accepted. Teacher forcing (SFT) is training on these."""
    labels = slot_labels(rollout.tokens, rows, anchors, num_draft_tokens)
    num_valid = num_valid_slots(anchors, rollout.lengths[rows], num_draft_tokens)
    return DraftBlocks(rows, anchors, labels, num_valid, num_valid)


@torch.no_grad()
def draft_at(
    drafter: Drafter, state: object, rollout: Rollout, anchors: torch.Tensor, live: torch.Tensor
) -> DraftBlocks:
    """
    Draft afresh at chosen anchors and judge the proposals against the text.

    Args:
        drafter ([`Drafter`]): Bound to its target.
        state: Its drafting state, holding the texts.
        rollout ([`Rollout`]): The texts.
        anchors (`torch.LongTensor` of shape `(B, M)`): A grid of anchors.
        live (`torch.BoolTensor` of shape `(B, M)`): Cells that hold one.

    Returns:
        [`DraftBlocks`] of the live cells, row by row.
    """
    tokens = rollout.tokens.gather(1, anchors)
    proposed = drafter.propose(state, tokens, anchors, rollout.tokens.shape[1], ARGMAX).tokens
    rows, columns = live.nonzero().T
    chosen = anchors[rows, columns]
    labels = slot_labels(rollout.tokens, rows, chosen, drafter.num_draft_tokens)
    num_valid = num_valid_slots(chosen, rollout.lengths[rows], drafter.num_draft_tokens)
    draft_tokens = proposed[rows, columns]
    return DraftBlocks(rows, chosen, draft_tokens, judge_against_text(draft_tokens, labels, num_valid), num_valid)


@torch.no_grad()
def replay_text(
    drafter: Drafter, rollout: Rollout, features: torch.Tensor, num_chains: int = 8
) -> DraftBlocks:
    """
    The blocks real speculation with this drafter would have judged on these texts, without decoding.

    Proposals are argmax, so each is accepted exactly where the text agrees, at any rollout temperature. What happens
    at an anchor depends on nothing but the anchor, so several chains run side by side from spread-out positions of
    one text and stop where another has been; the chain from the completion's first token is then read off the
    outcomes. Exact for any `num_chains`; more chains mean fewer sequential rounds and some wasted blocks.

    Args:
        drafter ([`Drafter`]): Bound to its target.
        rollout ([`Rollout`]): Texts the target wrote.
        features (`torch.Tensor` of shape `(B, T, F)`): Tapped states of the texts.
        num_chains (`int`, *optional*, defaults to `8`): Chains started on each text.

    Returns:
        [`DraftBlocks`] in text order.
    """
    batch, length = rollout.tokens.shape
    device = rollout.tokens.device
    state = drafter.start(batch, length)
    positions = torch.arange(length, device=device).expand(batch, -1)
    drafter.extend(state, features, positions, rollout.tokens)

    last = rollout.lengths - 1  # an anchor at the last token has nothing left to propose
    share = torch.arange(num_chains, device=device) / num_chains
    anchors = rollout.prompt_lengths[:, None] + (share * (last - rollout.prompt_lengths)[:, None]).long()
    accepted_at = torch.full((batch, length), -1, dtype=torch.long, device=device)
    drafts_at = torch.zeros((batch, length, drafter.num_draft_tokens), dtype=torch.long, device=device)
    live = anchors < last[:, None]
    while bool(live.any()):
        # Drop finished chains, so that a few long ones do not pay for all.
        width = int(live.sum(1).max())
        order = torch.argsort(live.long(), dim=1, descending=True, stable=True)[:, :width]
        anchors, live = anchors.gather(1, order), live.gather(1, order)
        blocks = draft_at(drafter, state, rollout, torch.where(live, anchors, 0), live)
        accepted_at[blocks.rows, blocks.anchors] = blocks.num_accepted
        drafts_at[blocks.rows, blocks.anchors] = blocks.draft_tokens
        anchors = anchors.clone()
        anchors[live] = blocks.anchors + blocks.num_accepted + 1
        live = live & (anchors < last[:, None])
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


def row_generator(seed: int, step: int, tokens: torch.Tensor) -> torch.Generator:
    """A generator for one text at one optimizer step, whatever batch, rank or micro-step it falls in."""
    key = zlib.crc32(tokens.cpu().numpy().tobytes(), zlib.crc32(f"{seed}:{step}".encode()))
    return torch.Generator().manual_seed(key)


def random_anchors(length: int, prompt_length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Up to `count` distinct anchors inside a completion, sorted; SFT drafts from these."""
    candidates = length - 1 - prompt_length
    chosen = torch.randperm(max(candidates, 0), generator=generator)[:count]
    return chosen.sort().values + prompt_length


def choose_blocks(blocks: DraftBlocks, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of up to `count` blocks of one text: those with an error first, then others, drawn at random."""
    if len(blocks) <= count:
        return torch.arange(len(blocks), device=blocks.rows.device)
    keys = torch.rand(len(blocks), generator=generator).to(blocks.rows.device) - blocks.has_error.float()
    return keys.argsort()[:count].sort().values


@dataclass(frozen=True)
class StreamSettings:
    """
    Which slots teach, and how much.

    Args:
        accepted_weight (`float`): λ of the accepted stream: text tokens up to and including the next anchor.
        rejected_weight (`float`): λ of the rejected stream: drafted tokens from the first rejected slot on.
        rejected_decay (`float`): γ; weight of the i-th rejected slot is `γ ** (i − 1)`.
        accepted_decay (`float`): Weight of slot k of the accepted stream is `accepted_decay ** (k − 1)`.
        sft_decay (`float`): The same for blocks of random anchors (`lmbda < 1`).
    """

    accepted_weight: float = 1.0
    rejected_weight: float = 0.0
    rejected_decay: float = 0.8
    accepted_decay: float = 1.0
    sft_decay: float = 1.0


def stream_weights(
    blocks: DraftBlocks, on_policy: torch.Tensor, streams: StreamSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights `(N, K)` of both streams, λ included (Draft-OPD, section 3).

    `on_policy` `(N,)` marks blocks drafted by the drafter; the rest are text blocks, whose slots are all accepted.
    """
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.rows.device)
    accepted_until = torch.minimum(blocks.num_accepted + 1, blocks.num_valid)[:, None]
    decay = torch.where(on_policy, streams.accepted_decay, streams.sft_decay)[:, None]
    accepted = (slots < accepted_until) * decay**slots * torch.where(on_policy, streams.accepted_weight, 1.0)[:, None]
    behind = slots - blocks.num_accepted[:, None]
    in_rejected = (behind >= 0) & (blocks.has_error & on_policy)[:, None]
    rejected = torch.where(in_rejected, streams.rejected_weight * streams.rejected_decay ** behind.clamp(min=0), 0.0)
    return accepted.float(), rejected.float()


def make_batch(
    target: Target,
    rollout: Rollout,
    blocks: DraftBlocks,
    on_policy: torch.Tensor,
    streams: StreamSettings,
    features: torch.Tensor,
    states: torch.Tensor,
    cache: object | None = None,
    block_states: torch.Tensor | None = None,
) -> ReplayBatch:
    """
    The batch of one micro-step from texts, chosen blocks and what the target said of both.

    Args:
        on_policy (`torch.BoolTensor` of shape `(N,)`): Blocks the drafter proposed.
        features, states (`torch.Tensor` of shapes `(B, T, F)` and `(B, T, H)`): From [`Target.forward_text`].
        cache ([`PositionCache`], *optional*): Holding the texts; needed where rejected slots must be scored.
        block_states (`torch.Tensor` of shape `(N, K, H)`, *optional*): What verification kept; saves scoring.

    Returns:
        [`ReplayBatch`] whose `denominator` is this micro-batch's own weight.
    """
    num_draft_tokens = blocks.num_draft_tokens
    accepted, rejected = stream_weights(blocks, on_policy, streams)
    before = slot_positions(blocks, rollout.tokens.shape[1]) - 1
    text_states = states[blocks.rows[:, None], before]
    draft_states = None
    if streams.rejected_weight > 0:
        if block_states is None:
            block_states = target.score_blocks(rollout.tokens, blocks, cache)
        slots = torch.arange(num_draft_tokens, device=before.device)
        # Up to the first rejected slot the drafted prefix is the text.
        on_text = (slots <= blocks.num_accepted[:, None])[..., None]
        draft_states = torch.where(on_text, text_states, block_states)
    return ReplayBatch(
        tokens=rollout.tokens,
        features=features,
        blocks=blocks,
        labels=slot_labels(rollout.tokens, blocks.rows, blocks.anchors, num_draft_tokens),
        text_states=text_states,
        draft_states=draft_states,
        accepted_weights=accepted,
        rejected_weights=rejected,
        denominator=accepted.sum() + rejected.sum(),
    )


def slot_positions(blocks: DraftBlocks, length: int) -> torch.Tensor:
    """Text positions of the K slots `(N, K)`, clamped into a text of `length`."""
    slots = torch.arange(1, blocks.num_draft_tokens + 1, device=blocks.rows.device)
    return (blocks.anchors[:, None] + slots).clamp(max=length - 1)


class ErrorBuffer:
    """
    Texts whose error positions are worth another look, drafted afresh when drawn.

    Holds token ids and positions only, so old entries cost nothing to keep and never go stale: what the *current*
    drafter proposes there is found when they are drawn.

    Args:
        size (`int`): Texts kept; the oldest leave first.
    """

    def __init__(self, size: int) -> None:
        self.entries: deque[tuple[list[int], int, list[int]]] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, rollout: Rollout, blocks: DraftBlocks) -> None:
        """Remember each text with the anchors of its blocks that held an error."""
        wrong = blocks.select(blocks.has_error)
        rows, anchors = wrong.rows.tolist(), wrong.anchors.tolist()
        for row, (tokens, prompt_length, length) in enumerate(
            zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
        ):
            chosen = [anchor for owner, anchor in zip(rows, anchors, strict=True) if owner == row]
            if chosen:
                self.entries.append((tokens[:length], prompt_length, chosen))

    def draw(self, count: int, generator: torch.Generator, device: torch.device | str = "cpu"):
        """`count` texts (fewer when fewer are held): a [`Rollout`] and the `(N,)` rows and anchors remembered."""
        index = torch.randperm(len(self.entries), generator=generator)[:count].tolist()
        picked = [self.entries[i] for i in index]
        rollout = Rollout.from_ids(
            [tokens[:prompt] for tokens, prompt, _ in picked],
            [tokens[prompt:] for tokens, prompt, _ in picked],
            device=device,
        )
        rows = [row for row, entry in enumerate(picked) for _ in entry[2]]
        anchors = [anchor for entry in picked for anchor in entry[2]]
        return rollout, torch.tensor(rows, device=device), torch.tensor(anchors, device=device)

    def state_dict(self) -> dict:
        return {"entries": list(self.entries)}

    def load_state_dict(self, state: dict) -> None:
        self.entries.clear()
        self.entries.extend(state["entries"])
