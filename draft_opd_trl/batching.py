"""Which blocks teach, and how much: from texts to the batch one micro-step trains on.

Holds the choice of anchors, the weights of the two streams and the assembly of [`ReplayBatch`]. Knows no losses, no
optimizer and no drafter kinds. `lmbda` mixes SFT (random anchors, the text as proposal) and Draft-OPD (anchors that
verification exposed, the drafter's own proposals) in one path, so that the two can be compared fairly.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .checks import check_settings
from .drafters.base import Drafter
from .limits import LIMITS
from .records import DraftBlocks, ReplayBatch, Rollout
from .replay import Coupling, ErrorBuffer, draft_at, grid_of, read_text, replay_text, slot_labels, text_blocks
from .sampling_params import SamplingParams
from .stopwatch import Stopwatch
from .target import Target
from .vocabulary import to_draft_ids


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
        return torch.arange(len(blocks), device=blocks.texts.device)
    keys = torch.rand(len(blocks), generator=generator).to(blocks.texts.device) - blocks.has_error.float()
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
        whole_blocks (`bool`): The accepted stream goes on behind the error position, to the end of the block; what
            it teaches there is the text, whatever was drafted.
    """

    accepted_weight: float = 1.0
    rejected_weight: float = 0.0
    rejected_decay: float = 0.8
    accepted_decay: float = 1.0
    sft_decay: float = 1.0
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        check_settings(self, LIMITS)


def stream_weights(
    blocks: DraftBlocks, on_policy: torch.Tensor, streams: StreamSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights `(N, K)` of both streams, λ included (Draft-OPD, section 3).

    `on_policy` `(N,)` marks blocks drafted by the drafter; the rest are text blocks, whose slots are all accepted.
    """
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.texts.device)
    accepted_until = torch.minimum(blocks.num_accepted + 1, blocks.num_valid)[:, None]
    if streams.whole_blocks:
        accepted_until = blocks.num_valid[:, None]
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
    batch = ReplayBatch(
        tokens=rollout.tokens,
        lengths=rollout.lengths,
        features=features,
        blocks=blocks,
        labels=slot_labels(rollout.tokens, blocks.texts, blocks.anchors, num_draft_tokens),
        states=states,
        draft_states=None,
        accepted_weights=accepted,
        rejected_weights=rejected,
        denominator=accepted.sum() + rejected.sum(),
    )
    if streams.rejected_weight > 0:
        if block_states is None:
            block_states = target.score_blocks(rollout.tokens, blocks, cache)
        slots = torch.arange(num_draft_tokens, device=blocks.texts.device)
        # Up to the first rejected slot the drafted prefix is the text.
        on_text = (slots <= blocks.num_accepted[:, None])[..., None]
        batch.draft_states = torch.where(on_text, batch.text_states, block_states)
    return batch


@dataclass
class ReplayMetrics:
    """What one optimizer step met on one rank, counted."""

    committed: int = 0
    verifications: int = 0
    errors: int = 0
    blocks: int = 0
    supervised: int = 0
    text_tokens: int = 0
    outside_vocab: int = 0
    accepted_by_slot: list[int] = field(default_factory=list)
    valid_by_slot: list[int] = field(default_factory=list)

    def figures(self) -> dict[str, tuple[int, int | None]]:
        """By name, a part and its whole; without one, what is counted a step. Of a whole of 0 there is no figure."""
        slots = enumerate(zip(self.accepted_by_slot, self.valid_by_slot, strict=True), start=1)
        return {
            "replay/blocks": (self.blocks, None),
            "replay/supervised_tokens": (self.supervised, None),
            "replay/outside_vocab": (self.outside_vocab, self.text_tokens),
            "acceptance/length": (self.committed, self.verifications),
            "replay/error_share": (self.errors, self.verifications),
            **{f"acceptance/slot_{slot}": counts for slot, counts in slots},
        }


class BatchMaker:
    """
    Turns texts into the batches of one optimizer step.

    Args:
        target ([`Target`]): The frozen target.
        drafter ([`Drafter`]): The drafter as it stands; read without gradients.
        streams ([`StreamSettings`]): Weights.
        lmbda (`float`): Probability that a text is replayed on-policy (1: Draft-OPD, 0: SFT). May be set anew
            before any step.
        num_anchors (`int`): Most blocks trained on, a text, new or remembered.
        num_chains (`int`): See [`replay_text`].
        seed (`int`): Draws depend on it, the step and the text alone, not on batch layout or rank (what the buffer
            holds does depend on the rank).
        buffer ([`ErrorBuffer`], *optional*): Error positions of earlier texts.
        replay_ratio (`float`): Texts drawn from the buffer for each new one; a fraction is drawn by chance.
        proposals ([`SamplingParams`], *optional*): Replay proposals drawn at these settings, the text's own; argmax
            proposals by default.
        anchors (`str`): Where on-policy blocks start: `exposed`, at the anchors verification of the current drafter
            has, or `random`, at as many others (an ablation). Proposals are the drafter's in both.
        stopwatch ([`Stopwatch`], *optional*): Takes the times of the target's pass over the texts (`target_text`), of
            finding and choosing blocks (`replay`) and of what the target says of them (`scoring`).
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        streams: StreamSettings,
        lmbda: float = 1.0,
        num_anchors: int = 512,
        num_chains: int = 8,
        seed: int = 0,
        buffer: ErrorBuffer | None = None,
        replay_ratio: float = 0.0,
        proposals: SamplingParams | None = None,
        anchors: str = "exposed",
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.target, self.drafter, self.streams = target, drafter, streams
        self.lmbda, self.num_anchors, self.num_chains, self.seed = lmbda, num_anchors, num_chains, seed
        self.buffer, self.replay_ratio = buffer, replay_ratio
        self.proposals, self.anchors = proposals, anchors
        self.stopwatch = stopwatch or Stopwatch(target.device)

    def __call__(
        self, rollouts: list[Rollout], step: int, fresh: bool = False
    ) -> tuple[list[ReplayBatch], ReplayMetrics]:
        """
        Args:
            rollouts (`list[Rollout]`): One a micro-step.
            step (`int`): Optimizer step; part of the seed.
            fresh (`bool`): The rollouts' own blocks came from the drafter as it stands now, so they need no replay.

        Returns:
            A [`ReplayBatch`] a micro-step, each with its own weight as denominator, and [`ReplayMetrics`].
        """
        num_draft_tokens = self.drafter.num_draft_tokens
        metrics = ReplayMetrics(accepted_by_slot=[0] * num_draft_tokens, valid_by_slot=[0] * num_draft_tokens)
        with self.target.uneven_forwards():
            made = [self._batch(rollout, step, fresh, metrics) for rollout in rollouts]
        if self.buffer is not None:
            # Only now, so that a step draws from earlier ones, into however many micro-steps its texts are split.
            for rollout, (_, blocks) in zip(rollouts, made, strict=True):
                self.buffer.add(rollout, blocks)
        return [batch for batch, _ in made], metrics

    def _batch(
        self, rollout: Rollout, step: int, fresh: bool, metrics: ReplayMetrics
    ) -> tuple[ReplayBatch, DraftBlocks]:
        """The batch of one micro-step, and all blocks drafted on its new texts."""
        num_new = len(rollout)
        fresh = fresh and self.anchors == "exposed"
        generators = [
            row_generator(self.seed, step, row[:length])
            for row, length in zip(rollout.tokens, rollout.lengths.tolist(), strict=True)
        ]
        texts, drawn_rows, drawn_anchors = self._with_remembered(rollout, generators)
        needs_scores = self.streams.rejected_weight > 0
        keeps_states = fresh and rollout.block_states is not None and not len(drawn_rows)
        cache = self.target.new_cache(*texts.tokens.shape) if needs_scores and not keeps_states else None
        with self.stopwatch.measure("target_text"):
            features, states = self.target.forward_text(texts.tokens, self.drafter.target_layer_ids, cache)

        with self.stopwatch.measure("replay"):
            on_policy_rows = [bool(torch.rand((), generator=generator) < self.lmbda) for generator in generators]
            new_features = features[:num_new, : rollout.tokens.shape[1]]
            coupling = self._coupling(texts, states, step)
            blocks, kept_states = self._drafted_blocks(
                rollout, fresh, new_features, on_policy_rows, coupling, generators
            )
            self._count(rollout, blocks, on_policy_rows, metrics)
            chosen, chosen_blocks = self._choose(rollout, blocks, generators, on_policy_rows)
            if len(drawn_rows):
                state = read_text(self.drafter, texts, features)
                grid = grid_of(drawn_rows, drawn_anchors, len(texts))
                drawn_blocks = draft_at(self.drafter, state, texts, *grid, coupling)
                chosen_blocks = [*chosen_blocks, drawn_blocks]
            on_policy = torch.cat(
                [
                    torch.full((len(part),), index > 0, device=features.device)
                    for index, part in enumerate(chosen_blocks)
                ]
            )

        with self.stopwatch.measure("scoring"):
            kept = None
            if needs_scores and keeps_states:
                kept = self._kept_states(kept_states[chosen], len(chosen_blocks[0]))
            batch = make_batch(
                self.target,
                texts,
                DraftBlocks.cat(chosen_blocks),
                on_policy,
                self.streams,
                features,
                states,
                cache,
                kept,
            )
        metrics.blocks += len(batch.blocks)
        metrics.supervised += int(((batch.accepted_weights > 0) | (batch.rejected_weights > 0)).sum())
        return batch, blocks

    def _with_remembered(
        self, rollout: Rollout, generators: list[torch.Generator]
    ) -> tuple[Rollout, torch.Tensor, torch.Tensor]:
        """New texts with those drawn from the buffer under them, and rows and anchors of the latter `(N,)`."""
        parts = [Rollout(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]
        rows, anchors = [rollout.lengths[:0]], [rollout.lengths[:0]]
        if self.buffer is not None and len(self.buffer) and self.replay_ratio:
            whole, fraction = divmod(self.replay_ratio, 1)
            for generator in generators:
                wanted = int(whole) + int(torch.rand((), generator=generator) < fraction)
                if wanted:
                    drawn, drawn_rows, drawn_anchors = self.buffer.draw(
                        wanted, self.num_anchors, generator, rollout.tokens.device
                    )
                    rows.append(drawn_rows + sum(len(part) for part in parts))
                    anchors.append(drawn_anchors)
                    parts.append(drawn)
        return Rollout.cat(parts), torch.cat(rows), torch.cat(anchors)

    def _coupling(self, texts: Rollout, states: torch.Tensor, step: int) -> Coupling | None:
        """Draws for every anchor of every text, where proposals are drawn at all."""
        if self.proposals is None:
            return None
        shape = (self.drafter.num_draft_tokens, 2)
        rows = [
            torch.rand((length, *shape), generator=row_generator(self.seed + 1, step, row[:length]))
            for row, length in zip(texts.tokens, texts.lengths.tolist(), strict=True)
        ]
        uniforms = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(states.device)
        return Coupling(self.target, states, self.proposals, uniforms)

    def _drafted_blocks(
        self,
        rollout: Rollout,
        fresh: bool,
        features: torch.Tensor,
        on_policy_rows: list[bool],
        coupling: Coupling | None,
        generators: list[torch.Generator],
    ) -> tuple[DraftBlocks, torch.Tensor | None]:
        """The drafter's blocks on the on-policy rows, and what verification kept of the target's states there."""
        on_policy = torch.tensor(on_policy_rows, device=features.device)
        if fresh and rollout.blocks is not None:
            chosen = on_policy[rollout.blocks.texts]
            states = None if rollout.block_states is None else rollout.block_states[chosen]
            return rollout.blocks.select(chosen), states
        rows = on_policy.nonzero()[:, 0]
        if not len(rows):
            return DraftBlocks.empty(self.drafter.num_draft_tokens, features.device), None
        replayed = Rollout(rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows])
        coupling = None if coupling is None else coupling.select(rows)
        if self.anchors == "exposed":
            blocks = replay_text(self.drafter, replayed, features[rows], self.num_chains, coupling)
        else:
            places = self._random_places(replayed, range(len(rows)), [generators[row] for row in rows.tolist()])
            state = read_text(self.drafter, replayed, features[rows])
            blocks = draft_at(self.drafter, state, replayed, *grid_of(*places, len(replayed)), coupling)
        blocks.texts = rows[blocks.texts]
        return blocks, None

    def _random_places(
        self, rollout: Rollout, rows: Sequence[int], generators: list[torch.Generator]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and anchors `(N,)`: `num_anchors` random ones of each of these texts, drawn by its generator."""
        lengths, prompt_lengths = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
        owners, anchors = [rollout.lengths[:0]], [rollout.lengths[:0]]
        for row, generator in zip(rows, generators, strict=True):
            drawn = random_anchors(lengths[row], prompt_lengths[row], self.num_anchors, generator)
            anchors.append(drawn.to(rollout.tokens.device))
            owners.append(torch.full_like(anchors[-1], row))
        return torch.cat(owners), torch.cat(anchors)

    def _choose(
        self, rollout: Rollout, blocks: DraftBlocks, generators: list[torch.Generator], on_policy_rows: list[bool]
    ) -> tuple[torch.Tensor, list[DraftBlocks]]:
        """Indices of drafted blocks to train on, and `[text blocks of SFT rows, drafted blocks]`."""
        device = rollout.tokens.device
        kept: list[torch.Tensor] = [rollout.lengths[:0]]
        counts = torch.bincount(blocks.texts, minlength=len(rollout)).tolist()
        start = 0
        for row, (generator, on_policy) in enumerate(zip(generators, on_policy_rows, strict=True)):
            stop = start + counts[row]
            if on_policy:
                index = torch.arange(start, stop, device=device)
                kept.append(index[choose_blocks(blocks.select(index), self.num_anchors, generator)])
            start = stop
        sft_rows = [row for row, on_policy in enumerate(on_policy_rows) if not on_policy]
        places = self._random_places(rollout, sft_rows, [generators[row] for row in sft_rows])
        index = torch.cat(kept)
        return index, [text_blocks(rollout, *places, self.drafter.num_draft_tokens), blocks.select(index)]

    @staticmethod
    def _kept_states(states: torch.Tensor, num_forced: int) -> torch.Tensor:
        """States of the chosen blocks behind empty ones for the SFT blocks, which have no rejected slot."""
        return torch.cat([states.new_zeros((num_forced, *states.shape[1:])), states])

    def _count(
        self, rollout: Rollout, blocks: DraftBlocks, on_policy_rows: list[bool], metrics: ReplayMetrics
    ) -> None:
        if self.drafter.vocab_map is not None:
            # Completion tokens that the drafter cannot propose, whatever it learns.
            places = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
            written = (places >= rollout.prompt_lengths[:, None]) & (places < rollout.lengths[:, None])
            _, inside = to_draft_ids(rollout.tokens[written], self.drafter.vocab_map)
            metrics.text_tokens += inside.numel()
            metrics.outside_vocab += int((~inside).sum())
        if self.anchors == "random":
            return  # these blocks do not follow each other, so they are no verification of the text
        on_policy = torch.tensor(on_policy_rows, device=rollout.lengths.device)
        committed = (rollout.completion_lengths - 1).clamp(min=0)
        metrics.committed += int(committed[on_policy].sum())
        metrics.verifications += len(blocks)
        metrics.errors += int(blocks.has_error.sum())
        slots = torch.arange(blocks.num_draft_tokens, device=blocks.texts.device)
        for name, until in (("accepted_by_slot", blocks.num_accepted), ("valid_by_slot", blocks.num_valid)):
            sums = (slots < until[:, None]).sum(0).tolist()
            setattr(metrics, name, [old + new for old, new in zip(getattr(metrics, name), sums, strict=True)])
