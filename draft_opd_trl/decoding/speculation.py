"""The one loop: propose → verify → commit, batched and ragged, for any drafter.

Without a drafter it is plain decoding by the same engine. Knows nothing of gradients, data sets or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..core.checks import settle
from ..core.errors import InputError
from ..core.limits import LIMITS
from ..core.records import DraftBlocks, Rollout, num_valid_slots
from ..core.sampling import Chooser, draw_at, probabilities
from ..core.sampling_params import SamplingParams
from ..core.seeding import ACCEPT, COMMIT, PROPOSE, text_uniforms
from ..core.target import Target
from ..core.verification import verify_greedy, verify_sampled
from ..drafters.base import Drafter
from .plain import OnText, rollout_alone


@dataclass
class SpeculationSettings:
    """
    Settings of the loop.

    Args:
        max_new_tokens (`int`):
            Longest completion, stop token included.
        stop_token_ids (`Sequence[int]`):
            Tokens that end a text, also from inside a block.
        sampling ([`SamplingParams`], *optional*):
            The target's law; greedy by default.
        sample_proposals (`bool`, *optional*, defaults to `False`):
            Draw proposals at the target's settings instead of taking the drafter's argmax.
        batch_size (`int`, *optional*, defaults to `16`):
            Texts decoded side by side. The lane of a finished one is refilled at once.
        keep_states (`bool`, *optional*, defaults to `False`):
            Keep the target states that judged each slot, so that training need not compute them again.
        pad_token_id (`int`, *optional*, defaults to `0`):
            Fills the right of shorter texts.

    Raises:
        `ValueError` or `TypeError`: A setting is outside its range, or of the wrong type.
    """

    max_new_tokens: int
    stop_token_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()
    sample_proposals: bool = False
    batch_size: int = 16
    keep_states: bool = False
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        settle(self, LIMITS)


class Lanes:
    """
    The texts that are decoded side by side: a lane each, with its tokens, its caches and how far it has come.

    Tensors alone, on the target's device; which prompt a lane holds is known to [`speculate`].

    Args:
        target ([`Target`]), drafter ([`Drafter`], *optional*): Bound to each other.
        settings ([`SpeculationSettings`]): Lengths, law.
        num_lanes (`int`): R, texts side by side.
        longest_prompt (`int`): Tokens of the longest prompt that a lane will hold.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        settings: SpeculationSettings,
        num_lanes: int,
        longest_prompt: int,
    ) -> None:
        self.target, self.drafter, self.settings = target, drafter, settings
        self.num_draft_tokens = drafter.num_draft_tokens if drafter is not None else 0
        self.layer_ids = drafter.target_layer_ids if drafter is not None else []
        self.max_length = longest_prompt + settings.max_new_tokens + self.num_draft_tokens + 1
        self.cache = target.new_cache(num_lanes, self.max_length)
        self.state = drafter.start(num_lanes, self.max_length) if drafter is not None else None
        per_lane = {"dtype": torch.long, "device": target.device}
        self.tokens = torch.full((num_lanes, self.max_length), settings.pad_token_id, **per_lane)
        self.lengths = torch.ones(num_lanes, **per_lane)
        self.ends = torch.ones(num_lanes, **per_lane)
        self.seeds = torch.zeros(num_lanes, **per_lane)
        self.stops = torch.tensor(list(settings.stop_token_ids), **per_lane)

    def uniforms(self, anchors: torch.Tensor, count: int, purpose: int) -> torch.Tensor:
        """[`text_uniforms`] `(R, count)` of the positions after the anchors."""
        positions = anchors[:, None] + torch.arange(1, count + 1, device=anchors.device)
        return text_uniforms(self.seeds, positions, purpose)


@dataclass
class Proposals:
    """
    What a round proposes.

    Args:
        anchors (`torch.LongTensor` of shape `(R,)`): Position of each lane's last committed token.
        limit (`int`): Positions to attend to, above all in play.
        block (`torch.LongTensor` of shape `(R, K + 1)`): The tokens at the anchors, then the proposals, as target
            ids; K = 0 without a drafter.
        probs (`torch.Tensor` of shape `(R, K, V)`, *optional*): What proposals were drawn from, if they were.
    """

    anchors: torch.Tensor
    limit: int
    block: torch.Tensor
    probs: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """`(R, K)`: the proposals alone."""
        return self.block[:, 1:]


@dataclass
class Verdicts:
    """
    What the target said of proposals.

    Args:
        num_accepted (`torch.LongTensor` of shape `(R,)`): Length of each accepted run.
        after (`torch.LongTensor` of shape `(R,)`): The token after the run.
        positions (`torch.LongTensor` of shape `(R, K + 1)`): Of the anchor and the proposals.
        features, states (`torch.Tensor` of shapes `(R, K + 1, F)` and `(R, K + 1, H)`): The target's, there.
    """

    num_accepted: torch.Tensor
    after: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor
    states: torch.Tensor


def prefill(
    lanes: Lanes, index: torch.Tensor, prompts: torch.Tensor, sizes: torch.Tensor, seeds: torch.Tensor
) -> torch.Tensor:
    """
    Put prompts into lanes, each followed by the first token of its completion.

    Args:
        lanes ([`Lanes`]): Written in place.
        index (`torch.LongTensor` of shape `(L,)`): The lanes that are free for them.
        prompts (`torch.LongTensor` of shape `(L, W)`), sizes (`torch.LongTensor` of shape `(L,)`): Right-padded
            prompts and their lengths.
        seeds (`torch.LongTensor` of shape `(L,)`): One a text.

    Returns:
        `torch.BoolTensor` of shape `(L,)`: texts that end with that token.
    """
    target, settings, width = lanes.target, lanes.settings, prompts.shape[1]
    positions = torch.arange(width, device=prompts.device).expand(len(index), -1)
    features, states = target.forward_cached(prompts, positions, lanes.cache, width, lanes.layer_ids, index)
    logits = target.logits(states[torch.arange(len(index), device=prompts.device), sizes - 1])
    if settings.sampling.greedy:
        first = logits.argmax(-1)
    else:
        uniforms = text_uniforms(seeds, sizes[:, None], COMMIT)[:, 0]
        first = draw_at(probabilities(logits, settings.sampling), uniforms)
    lanes.tokens[index] = settings.pad_token_id
    lanes.tokens[index, :width] = prompts
    lanes.tokens[index, sizes] = first
    lanes.lengths[index], lanes.seeds[index] = sizes + 1, seeds
    lanes.ends[index] = sizes + settings.max_new_tokens
    if lanes.drafter is not None:
        lanes.drafter.extend(lanes.state, features, positions, lanes.tokens[index], index)
    return torch.isin(first, lanes.stops) | (settings.max_new_tokens == 1)


def propose(lanes: Lanes, longest: int) -> Proposals:
    """What the drafter proposes after each lane's last token; `longest` is the length of the longest text in play."""
    anchors = lanes.lengths - 1
    limit = min(longest + lanes.num_draft_tokens, lanes.max_length)
    anchor_tokens = lanes.tokens.gather(1, anchors[:, None])
    if lanes.drafter is None:
        return Proposals(anchors, limit, anchor_tokens)
    choose, sampling = Chooser(), lanes.settings.sampling
    if lanes.settings.sample_proposals and not sampling.greedy:
        choose = Chooser(sampling, lanes.uniforms(anchors, lanes.num_draft_tokens, PROPOSE)[:, None])
    drafted = lanes.drafter.propose(lanes.state, anchor_tokens, anchors[:, None], limit, choose)
    block = torch.cat([anchor_tokens, drafted.tokens[:, 0]], dim=1)
    return Proposals(anchors, limit, block, None if drafted.probs is None else drafted.probs[:, 0])


def verify(lanes: Lanes, proposals: Proposals) -> Verdicts:
    """One pass of the target over the proposals of all lanes, and the accept/reject rule on what it says."""
    anchors, sampling, num_draft_tokens = proposals.anchors, lanes.settings.sampling, lanes.num_draft_tokens
    positions = anchors[:, None] + torch.arange(num_draft_tokens + 1, device=anchors.device)
    features, states = lanes.target.forward_cached(
        proposals.block, positions, lanes.cache, proposals.limit, lanes.layer_ids
    )
    logits = lanes.target.logits(states)
    if sampling.greedy:
        num_accepted, after = verify_greedy(proposals.tokens, logits.argmax(-1))
    else:
        # One token of a block is drawn, wherever the run before it ends, so the block's own number does for it.
        uniforms = [lanes.uniforms(anchors, num_draft_tokens, ACCEPT), lanes.uniforms(anchors, 1, COMMIT)]
        target_probs = probabilities(logits, sampling)
        num_accepted, after = verify_sampled(proposals.tokens, proposals.probs, target_probs, torch.cat(uniforms, 1))
    return Verdicts(num_accepted, after, positions, features, states)


def commit(lanes: Lanes, proposals: Proposals, verdicts: Verdicts) -> torch.Tensor:
    """
    Write each lane's accepted run and the token after it, up to a stop token or the limit, and let the drafter read
    them. Returns `(R,)` bool: texts that have ended.
    """
    num_accepted, after = verdicts.num_accepted[:, None], verdicts.after[:, None]
    committed = torch.cat([proposals.tokens, after], dim=1).scatter_(1, num_accepted, after)
    width = committed.shape[1]
    offsets = torch.arange(width, device=committed.device)
    count = torch.minimum(verdicts.num_accepted + 1, lanes.ends - lanes.lengths)
    stops = torch.isin(committed, lanes.stops) & (offsets < count[:, None])
    first_stop = torch.where(stops.any(1), stops.long().argmax(1) + 1, width + 1)
    ended = (first_stop <= count) | (lanes.lengths + count >= lanes.ends)
    count = torch.minimum(count, first_stop)
    places = (lanes.lengths[:, None] + offsets).clamp(max=lanes.max_length - 1)
    lanes.tokens.scatter_(1, places, torch.where(offsets < count[:, None], committed, lanes.settings.pad_token_id))
    if lanes.drafter is not None:
        lanes.drafter.extend(lanes.state, verdicts.features, verdicts.positions, lanes.tokens)
    lanes.lengths = lanes.lengths + count
    return ended


class _Desk:
    """The host's side: which prompt each lane holds and how far it has come, and what has been written."""

    def __init__(
        self, lanes: Lanes, prompts: Sequence[Sequence[int]], seeds: Sequence[int], on_text: OnText | None
    ) -> None:
        self.lanes, self.prompts, self.on_text = lanes, prompts, on_text
        self.seeds = torch.tensor(seeds, dtype=torch.long, device=lanes.tokens.device)
        self.prompt_of: list[int | None] = [None] * len(lanes.tokens)
        self.lengths = [1] * len(lanes.tokens)
        self.next_prompt = self.finished = self.committed = self.verifications = 0
        self.texts: list[torch.Tensor | None] = [None] * len(prompts)
        self.runs: list[list[int]] = [[] for _ in prompts]
        self.blocks: list[DraftBlocks] = []
        self.states: list[torch.Tensor] = []
        # Whom the lanes held when active lanes and their prompts were last copied to the device; and these copies.
        self.held, self.held_at = [], ()

    @property
    def active(self) -> list[int]:
        return [lane for lane, prompt in enumerate(self.prompt_of) if prompt is not None]

    @property
    def longest(self) -> int:
        return max(self.lengths[lane] for lane in self.active)

    def fill(self) -> bool:
        """Prefill waiting prompts into free lanes; returns whether any text is to be continued."""
        while taken := self._take():
            prompts = [torch.as_tensor(self.prompts[self.prompt_of[lane]]) for lane in taken]
            padding = self.lanes.settings.pad_token_id
            padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=padding)
            index, sizes = (torch.tensor(v, device=self.seeds.device) for v in (taken, list(map(len, prompts))))
            seeds = self.seeds[self.next_prompt - len(taken) : self.next_prompt]
            ended = prefill(self.lanes, index, padded.to(index.device), sizes, seeds).tolist()
            for lane, prompt, end in zip(taken, prompts, ended, strict=True):
                self.lengths[lane] = len(prompt) + 1
                if end:
                    self._finish(lane)
        return bool(self.active)

    def _take(self) -> list[int]:
        """Free lanes, each now with the next prompt."""
        free = [lane for lane, prompt in enumerate(self.prompt_of) if prompt is None]
        taken = free[: len(self.prompts) - self.next_prompt]
        for lane in taken:
            self.prompt_of[lane] = self.next_prompt
            self.next_prompt += 1
        return taken

    def note(self, proposals: Proposals, verdicts: Verdicts, ended: torch.Tensor) -> None:
        """Take down a round, and free the lanes whose texts have ended."""
        active = self.active
        if self.lanes.drafter is not None:
            self._record(active, proposals, verdicts)
        # The one host sync of the round: how far each lane came, which ended, and what was accepted.
        progress = torch.stack([self.lanes.lengths, ended.long(), verdicts.num_accepted], dim=1).tolist()
        for lane in active:
            length, end, accepted = progress[lane]
            committed = length - self.lengths[lane]
            self.runs[self.prompt_of[lane]].append(min(accepted, committed))
            self.committed += committed
            self.lengths[lane] = length
            if end:
                self._finish(lane)
        self.verifications += len(active)

    def _record(self, active: list[int], proposals: Proposals, verdicts: Verdicts) -> None:
        """The blocks of active lanes; how many slots lie inside the text is known once it has ended."""
        if self.held != self.prompt_of:  # a copy waits for the device, so none is made in other rounds
            self.held, prompts = list(self.prompt_of), [self.prompt_of[lane] for lane in active]
            self.held_at = tuple(torch.tensor(values, device=self.seeds.device) for values in (active, prompts))
        index, texts = self.held_at
        accepted = verdicts.num_accepted[index]
        self.blocks.append(DraftBlocks(texts, proposals.anchors[index], proposals.tokens[index], accepted, accepted))
        if self.lanes.settings.keep_states:
            self.states.append(verdicts.states[index, :-1])

    def _finish(self, lane: int) -> None:
        prompt, self.prompt_of[lane] = self.prompt_of[lane], None
        self.texts[prompt] = self.lanes.tokens[lane, : self.lengths[lane]].clone()
        # A lane that is free stands at its start, and stays there.
        self.lanes.lengths[lane] = self.lanes.ends[lane] = 1
        self.finished += 1
        if self.on_text is not None:
            self.on_text(prompt, self.texts[prompt][len(self.prompts[prompt]) :].tolist(), self.runs[prompt])

    def rollout(self) -> Rollout:
        """All texts in the order of their prompts, with the blocks that were drafted for them."""
        lanes, device = self.lanes, self.seeds.device
        lengths = torch.tensor([len(text) for text in self.texts], device=device)
        padding = lanes.settings.pad_token_id
        tokens = torch.nn.utils.rnn.pad_sequence(self.texts, batch_first=True, padding_value=padding)
        rollout = Rollout(tokens, torch.tensor([len(prompt) for prompt in self.prompts], device=device), lengths)
        if lanes.drafter is None:
            return rollout
        if not self.blocks:
            rollout.blocks = DraftBlocks.empty(lanes.num_draft_tokens, device)
            return rollout
        blocks = DraftBlocks.cat(self.blocks)
        order = torch.argsort(blocks.texts * lanes.max_length + blocks.anchors)
        blocks = blocks.select(order)
        blocks.num_valid = num_valid_slots(blocks.anchors, lengths[blocks.texts], lanes.num_draft_tokens)
        blocks.num_accepted = torch.minimum(blocks.num_accepted, blocks.num_valid)
        rollout.blocks = blocks
        if lanes.settings.keep_states:
            rollout.block_states = torch.cat(self.states)[order]
        return rollout


@torch.no_grad()
def speculate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    generator: torch.Generator | None = None,
    on_round: Callable[[int, int, int], None] | None = None,
    on_text: OnText | None = None,
    seeds: Sequence[int] | None = None,
) -> Rollout:
    """
    Write texts with the target, sped up by the drafter; lossless whatever the drafter proposes.

    Args:
        target ([`Target`]): Verifies, and so decides every token.
        drafter ([`Drafter`], *optional*): Bound to the target; `None` decodes plainly, one token a round.
        prompts (`Sequence[Sequence[int]]`): Token ids, each at least one token long.
        settings ([`SpeculationSettings`]): Lengths, law, batching.
        generator (`torch.Generator`, *optional*): Draws the seeds, where they are not given.
        on_round (`Callable`, *optional*): Called as `on_round(finished texts, committed tokens, verifications)`.
        on_text (`Callable`, *optional*): Called when a text has ended, as `on_text(prompt, completion, accepted)`: the
            prompt's index, token ids, and the length of each block's accepted run inside the text.
        seeds (`Sequence[int]`, *optional*): One a prompt. At temperature > 0 a text depends on its prompt and its seed
            alone, not on the texts beside it (to rounding, as at temperature 0).

    Returns:
        [`Rollout`] in the order of `prompts`. A text's first token comes from the prefill; every further one from a
        verification, so acceptance length is `(completion tokens − 1) / blocks`.

    Raises:
        `ValueError`: No prompt, or an empty one.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise InputError("`prompts` needs at least one prompt, and each at least one token.")
    if seeds is None:
        seeds = [0] * len(prompts) if settings.sampling.greedy else _drawn_seeds(len(prompts), generator)
    if drafter is None and target.no_places and not target.sharded:
        return rollout_alone(target, prompts, settings, seeds, on_round, on_text)
    num_lanes, longest_prompt = min(settings.batch_size, len(prompts)), max(map(len, prompts))
    lanes = Lanes(target, drafter, settings, num_lanes, longest_prompt)
    desk = _Desk(lanes, prompts, seeds, on_text)
    while desk.fill():
        proposals = propose(lanes, desk.longest)
        verdicts = verify(lanes, proposals)
        ended = commit(lanes, proposals, verdicts)
        desk.note(proposals, verdicts, ended)
        if on_round is not None:
            on_round(desk.finished, desk.committed, desk.verifications)
    return desk.rollout()


def _drawn_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    device = None if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()
