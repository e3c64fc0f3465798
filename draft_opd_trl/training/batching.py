"""From texts to the batch that one micro-step trains on.

Asks replay what the drafter proposes, chooses blocks, and collects what the target says of them. Knows no losses, no
optimizer and no drafter kinds. λ (`lmbda`) mixes SFT (random anchors, the text as proposal) and Draft-OPD (anchors
that verification exposed, the drafter's own proposals) in one path, so that the two can be compared fairly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch.nn import functional

from ..core.records import DraftBlocks, ReplayBatch, Rollout
from ..core.sampling_params import SamplingParams
from ..core.seeding import text_generator
from ..core.state_store import StateStore
from ..core.stopwatch import Stopwatch
from ..core.target import Target
from ..decoding.coupling import Coupling
from ..decoding.replay import draft_at, grid_of, judging_states, read_text, replay_text, text_blocks
from ..drafters.base import Drafter
from .block_choice import OnPolicySettings, choose_in_each_text, random_places
from .error_buffer import ErrorBuffer
from .replay_counts import Counts, add_counts, count_outside, count_taught, count_verification
from .streams import StreamSettings, stream_weights


class BatchMaker:
    """
    Turns texts into the batches of one optimizer step.

    Args:
        target ([`Target`]): The frozen target.
        drafter ([`Drafter`]): The drafter as it stands; read without gradients.
        streams ([`StreamSettings`]): Which slots teach, and how much.
        on_policy ([`OnPolicySettings`]): Which blocks of a text are drafted, and how they are found.
        seed (`int`): Draws depend on it, the step and the text alone, not on batch layout or rank (what the buffer
            holds does depend on the rank).
        buffer ([`ErrorBuffer`], *optional*): Error positions of earlier texts.
        proposals ([`SamplingParams`], *optional*): Replay proposals drawn at these settings, the text's own; argmax
            proposals by default.
        store ([`StateStore`], *optional*): Reads texts in the target's place, where their keys are not wanted.
        autocast (`Callable`, *optional*): Context in which argmax proposals are drafted: that of the losses. Drawn
            ones are drafted in the drafter's own dtype, as the target's distribution is read beside them.
        stopwatch ([`Stopwatch`], *optional*): Takes the times of the target's pass over the texts (`target_text`), of
            finding and choosing blocks (`replay`) and of what the target says of them (`scoring`).
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        streams: StreamSettings,
        on_policy: OnPolicySettings,
        seed: int,
        buffer: ErrorBuffer | None = None,
        proposals: SamplingParams | None = None,
        store: StateStore | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        if streams.sft_decay is None:
            streams = replace(streams, sft_decay=drafter.sft_decay)
        self.target, self.drafter = target, drafter
        self.streams, self.on_policy, self.seed = streams, on_policy, seed
        self.buffer, self.proposals, self.store = buffer, proposals, store
        self.autocast = autocast if proposals is None else nullcontext
        # Proposals behind an error are read by the rejected stream alone.
        self._judge_only = not streams.scores_rejected
        self.stopwatch = stopwatch or Stopwatch(target.device)

    def __call__(
        self, rollouts: list[Rollout], step: int, lmbda: float, fresh: bool = False
    ) -> tuple[list[ReplayBatch], Counts]:
        """
        Args:
            rollouts (`list[Rollout]`): One a micro-step.
            step (`int`): Optimizer step; part of the seed.
            lmbda (`float`): Probability that a text is replayed on-policy (1: Draft-OPD, 0: SFT).
            fresh (`bool`): The rollouts' own blocks came from the drafter as it stands now, so they need no replay.

        Returns:
            A [`ReplayBatch`] a micro-step, each with its own weight as denominator, and what was met, counted.
        """
        with self.target.uneven_forwards():
            made = [self._batch(rollout, step, lmbda, fresh) for rollout in rollouts]
        batches, drafted = zip(*made, strict=True)
        if self.buffer is not None:
            # Only now, so that a step draws from earlier ones, into however many micro-steps its texts are split.
            for rollout, blocks in zip(rollouts, drafted, strict=True):
                self.buffer.add(rollout, blocks)
        counts = add_counts(map(self._count, batches, rollouts, drafted))
        if self.store is not None:
            counts["replay/states_kept"] = self.store.take_counts()
        return list(batches), counts

    def _batch(self, rollout: Rollout, step: int, lmbda: float, fresh: bool) -> tuple[ReplayBatch, DraftBlocks]:
        """The batch of one micro-step, and all blocks that the drafter has on its new texts."""
        generators = [text_generator(self.seed, step, ids) for ids in _unpadded(rollout)]
        texts, remembered = self._with_remembered(rollout, generators)
        on_policy = [bool(torch.rand((), generator=generator) < lmbda) for generator in generators]
        fresh = fresh and rollout.blocks is not None and self.on_policy.anchors == "exposed"
        scores = self.streams.scores_rejected
        keeps_states = scores and fresh and rollout.block_states is not None and not len(remembered[0])
        cache = self.target.new_cache(*texts.tokens.shape) if scores and not keeps_states else None

        with self.stopwatch.measure("target_text"):
            if self.store is None or cache is not None:
                features, states = self.target.forward_text(texts.tokens, self.drafter.target_layer_ids, cache)
            else:
                features, states = self.store.read(texts.tokens, texts.lengths)

        with self.stopwatch.measure("replay"):
            coupling = self._coupling(texts, states, step)
            if fresh:
                own = torch.tensor(on_policy, device=features.device)[rollout.blocks.texts]
                drafted = rollout.blocks.select(own)
            else:
                drafted = self._replayed(rollout, on_policy, features, coupling, generators)
            chosen = choose_in_each_text(drafted, self.on_policy.num_anchors, generators)
            parts = [self._text_blocks(rollout, on_policy, generators), drafted.select(chosen)]
            if len(remembered[0]):
                parts.append(self._draft(texts, remembered, features, coupling))
            blocks = DraftBlocks.cat(parts)

        with self.stopwatch.measure("scoring"):
            num_text_blocks = len(parts[0])
            kept = None
            if keeps_states:
                # Text blocks have no rejected slot.
                kept = functional.pad(rollout.block_states[own][chosen], (0, 0, 0, 0, num_text_blocks, 0))
            drafters_own = torch.arange(len(blocks), device=features.device) >= num_text_blocks
            accepted, rejected = stream_weights(blocks, drafters_own, self.streams)
            batch = ReplayBatch(
                tokens=texts.tokens,
                lengths=texts.lengths,
                features=features,
                blocks=blocks,
                states=states,
                draft_states=judging_states(self.target, texts, blocks, states, cache, kept) if scores else None,
                accepted_weights=accepted,
                rejected_weights=rejected,
                denominator=accepted.sum() + rejected.sum(),
            )
        return batch, drafted

    def _with_remembered(
        self, rollout: Rollout, generators: list[torch.Generator]
    ) -> tuple[Rollout, tuple[torch.Tensor, torch.Tensor]]:
        """New texts with those drawn from the buffer under them, and texts and anchors `(N,)` of the latter."""
        parts = [Rollout(rollout.tokens, rollout.prompt_lengths, rollout.lengths)]
        owners, anchors = [rollout.lengths[:0]], [rollout.lengths[:0]]
        if self.buffer is not None and len(self.buffer) and self.on_policy.replay_ratio:
            whole, fraction = divmod(self.on_policy.replay_ratio, 1)
            for generator in generators:
                wanted = int(whole) + int(torch.rand((), generator=generator) < fraction)
                if wanted:
                    drawn, drawn_texts, drawn_anchors = self.buffer.draw(
                        wanted, self.on_policy.num_anchors, generator, rollout.tokens.device
                    )
                    owners.append(drawn_texts + sum(len(part) for part in parts))
                    anchors.append(drawn_anchors)
                    parts.append(drawn)
        return Rollout.cat(parts), (torch.cat(owners), torch.cat(anchors))

    def _coupling(self, texts: Rollout, states: torch.Tensor, step: int) -> Coupling | None:
        """Draws for every anchor of every text, where proposals are drawn at all."""
        if self.proposals is None:
            return None
        shape = (self.drafter.num_draft_tokens, 2)
        draws = [
            torch.rand((len(ids), *shape), generator=text_generator(self.seed + 1, step, ids))
            for ids in _unpadded(texts)
        ]
        uniforms = torch.nn.utils.rnn.pad_sequence(draws, batch_first=True).to(states.device)
        return Coupling(self.target, states, self.proposals, uniforms)

    def _replayed(
        self,
        rollout: Rollout,
        on_policy: list[bool],
        features: torch.Tensor,
        coupling: Coupling | None,
        generators: list[torch.Generator],
    ) -> DraftBlocks:
        """The blocks that the drafter as it stands has on the on-policy texts."""
        if not any(on_policy):
            return DraftBlocks.empty(self.drafter.num_draft_tokens, features.device)
        replayed = [text for text, own in enumerate(on_policy) if own]
        # Features are the largest tensor of a step: a slice shares them, an index would copy them.
        rows = slice(len(rollout)) if all(on_policy) else torch.tensor(replayed, device=features.device)
        texts = Rollout(rollout.tokens[rows], rollout.prompt_lengths[rows], rollout.lengths[rows])
        features = features[rows, : texts.tokens.shape[1]]
        coupling = None if coupling is None else coupling.select(rows)
        if self.on_policy.anchors == "exposed":
            with self.autocast():
                blocks = replay_text(
                    self.drafter, texts, features, self.on_policy.num_chains, coupling, self._judge_only
                )
        else:
            own = [generators[text] for text in replayed]
            places = random_places(texts, range(len(texts)), self.on_policy.num_anchors, own)
            blocks = self._draft(texts, places, features, coupling)
        if not all(on_policy):
            blocks.texts = rows[blocks.texts]
        return blocks

    def _draft(
        self,
        texts: Rollout,
        places: tuple[torch.Tensor, torch.Tensor],
        features: torch.Tensor,
        coupling: Coupling | None,
    ) -> DraftBlocks:
        """The drafter's blocks at places that do not follow from each other."""
        with self.autocast():
            state = read_text(self.drafter, texts, features)
            return draft_at(self.drafter, state, texts, *grid_of(*places, len(texts)), coupling, self._judge_only)

    def _text_blocks(self, rollout: Rollout, on_policy: list[bool], generators: list[torch.Generator]) -> DraftBlocks:
        """The text's own blocks at random anchors of the other texts (SFT)."""
        texts = [text for text, own in enumerate(on_policy) if not own]
        places = random_places(rollout, texts, self.on_policy.num_anchors, generators)
        return text_blocks(rollout, *places, self.drafter.num_draft_tokens)

    def _count(self, batch: ReplayBatch, rollout: Rollout, drafted: DraftBlocks) -> Counts:
        counts = count_taught(batch)
        if self.on_policy.anchors == "exposed":  # random blocks do not follow each other, so they verify no text
            counts |= count_verification(rollout, drafted)
        if self.drafter.vocab_map is not None:
            counts |= count_outside(rollout, self.drafter.vocab_map)
        return counts


def _unpadded(rollout: Rollout) -> list[torch.Tensor]:
    """Token ids of each text, on the CPU: copied at once, not text by text."""
    return [ids[:length] for ids, length in zip(rollout.tokens.cpu(), rollout.lengths.tolist(), strict=True)]
