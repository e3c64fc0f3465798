"""The one loop: propose → verify → commit, batched and ragged, for any drafter.

Without a drafter it is plain decoding by the same engine. Knows nothing of gradients, data sets or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .checks import check_settings
from .drafters.base import Drafter
from .errors import InputError
from .limits import LIMITS
from .records import DraftBlocks, Rollout, num_valid_slots
from .sampling import Chooser, draw_at, probabilities
from .sampling_params import SamplingParams
from .seeding import ACCEPT, COMMIT, PROPOSE, text_uniforms
from .target import Target
from .verification import verify_greedy, verify_sampled


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
            Rows decoded side by side. A finished row's slot is refilled at once.
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
        check_settings(self, LIMITS)


class _Slots:
    """The rows being decoded: which prompt each holds, its tokens, and how far it has come."""

    def __init__(self, target: Target, drafter: Drafter | None, prompts, seeds, settings: SpeculationSettings) -> None:
        self.target, self.drafter, self.settings = target, drafter, settings
        self.prompts = prompts
        self.prompt_seeds = torch.tensor(seeds, dtype=torch.long, device=target.device)
        self.num_draft_tokens = drafter.num_draft_tokens if drafter is not None else 0
        count = min(settings.batch_size, len(prompts))
        longest = max(len(prompt) for prompt in prompts)
        self.max_length = longest + settings.max_new_tokens + self.num_draft_tokens + 1
        device = target.device
        self.cache = target.new_cache(count, self.max_length)
        self.state = drafter.start(count, self.max_length) if drafter is not None else None
        self.tokens = torch.full((count, self.max_length), settings.pad_token_id, dtype=torch.long, device=device)
        self.lengths = torch.ones(count, dtype=torch.long, device=device)
        self.ends = torch.ones(count, dtype=torch.long, device=device)
        self.seeds = torch.zeros(count, dtype=torch.long, device=device)
        self.prompt_of: list[int | None] = [None] * count
        self.host_lengths = [1] * count
        self.next_prompt = 0
        self.stops = torch.tensor(list(settings.stop_token_ids), dtype=torch.long, device=device)

    @property
    def active(self) -> list[int]:
        return [slot for slot, prompt in enumerate(self.prompt_of) if prompt is not None]

    def layer_ids(self) -> list[int]:
        return self.drafter.target_layer_ids if self.drafter is not None else []

    def uniforms(self, anchors: torch.Tensor, count: int, purpose: int) -> torch.Tensor:
        """[`text_uniforms`] `(R, count)` of the positions after the anchors."""
        positions = anchors[:, None] + torch.arange(1, count + 1, device=anchors.device)
        return text_uniforms(self.seeds, positions, purpose)

    def chooser(self, anchors: torch.Tensor) -> Chooser:
        if not self.settings.sample_proposals or self.settings.sampling.greedy:
            return Chooser()
        return Chooser(self.settings.sampling, self.uniforms(anchors, self.num_draft_tokens, PROPOSE)[:, None])

    def refill(self) -> list[int]:
        """Prefill waiting prompts into free slots; returns the slots whose text ended with its first token."""
        free = [slot for slot, prompt in enumerate(self.prompt_of) if prompt is None]
        taken = free[: len(self.prompts) - self.next_prompt]
        if not taken:
            return []
        device = self.target.device
        prompts = [self.prompts[self.next_prompt + offset] for offset in range(len(taken))]
        rows = torch.tensor(taken, device=device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = max(len(prompt) for prompt in prompts)
        padded = torch.full((len(taken), width), self.settings.pad_token_id, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.as_tensor(prompt)
        padded = padded.to(device)
        positions = torch.arange(width, device=device).expand(len(taken), -1)
        features, states = self.target.forward_cached(padded, positions, self.cache, width, self.layer_ids(), rows)
        self.tokens[rows] = self.settings.pad_token_id
        self.tokens[rows, :width] = padded
        logits = self.target.logits(states[torch.arange(len(taken), device=device), sizes - 1])
        self.seeds[rows] = self.prompt_seeds[self.next_prompt : self.next_prompt + len(taken)]
        if self.settings.sampling.greedy:
            first = logits.argmax(-1)
        else:
            uniforms = text_uniforms(self.seeds[rows], sizes[:, None], COMMIT)[:, 0]
            first = draw_at(probabilities(logits, self.settings.sampling), uniforms)
        self.tokens[rows, sizes] = first
        self.lengths[rows] = sizes + 1
        self.ends[rows] = sizes + self.settings.max_new_tokens
        if self.drafter is not None:
            self.drafter.extend(self.state, features, positions, self.tokens[rows], rows)
        ended = (torch.isin(first, self.stops) | (self.settings.max_new_tokens == 1)).tolist()
        for offset, slot in enumerate(taken):
            self.prompt_of[slot] = self.next_prompt + offset
            self.host_lengths[slot] = len(prompts[offset]) + 1
        self.next_prompt += len(taken)
        return [slot for slot, end in zip(taken, ended, strict=True) if end]


def _verify(slots: _Slots, anchors, draft_tokens, draft_probs, logits):
    """Verdict on `(R, K)` proposals from logits `(R, K + 1, V)`: accepted counts and the token after them."""
    sampling, num_draft_tokens = slots.settings.sampling, draft_tokens.shape[1]
    if sampling.greedy:
        return verify_greedy(draft_tokens, logits.argmax(-1))
    # One token of a block is drawn, wherever the run before it ends, so the block's own number does for it.
    uniforms = [slots.uniforms(anchors, num_draft_tokens, ACCEPT), slots.uniforms(anchors, 1, COMMIT)]
    return verify_sampled(draft_tokens, draft_probs, probabilities(logits, sampling), torch.cat(uniforms, dim=1))


def _commit(slots: _Slots, draft_tokens: torch.Tensor, num_accepted: torch.Tensor, after: torch.Tensor):
    """
    Write accepted tokens and the one after them; stop inside the block where a stop token or the limit falls.

    Returns the number of tokens committed and whether the text ended, both `(R,)`.
    """
    width = draft_tokens.shape[1] + 1
    committed = torch.cat([draft_tokens, after[:, None]], dim=1)
    committed.scatter_(1, num_accepted[:, None], after[:, None])
    offsets = torch.arange(width, device=committed.device)
    count = torch.minimum(num_accepted + 1, slots.ends - slots.lengths)
    stops = torch.isin(committed, slots.stops) & (offsets < count[:, None])
    first_stop = torch.where(stops.any(1), stops.long().argmax(1) + 1, width + 1)
    ended = (first_stop <= count) | (slots.lengths + count >= slots.ends)
    count = torch.minimum(count, first_stop)
    positions = slots.lengths[:, None] + offsets
    kept = torch.where(offsets < count[:, None], committed, slots.settings.pad_token_id)
    slots.tokens.scatter_(1, positions.clamp(max=slots.max_length - 1), kept)
    return count, ended


@torch.no_grad()
def speculate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    generator: torch.Generator | None = None,
    on_round: Callable[[int, int, int], None] | None = None,
    on_text: Callable[[int, list[int], list[int]], None] | None = None,
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
    slots = _Slots(target, drafter, prompts, seeds, settings)
    texts: list[torch.Tensor | None] = [None] * len(prompts)
    runs: list[list[int]] = [[] for _ in prompts]
    record: list[tuple[DraftBlocks, torch.Tensor | None]] = []
    finished = verifications = committed_tokens = 0

    def finish(ended_slots: list[int]) -> None:
        nonlocal finished
        for slot in ended_slots:
            prompt = slots.prompt_of[slot]
            texts[prompt] = slots.tokens[slot, : slots.host_lengths[slot]].clone()
            slots.prompt_of[slot] = None
            if on_text is not None:
                on_text(prompt, texts[prompt][len(prompts[prompt]) :].tolist(), runs[prompt])
        finished += len(ended_slots)

    while True:
        while ended_at_once := slots.refill():
            finish(ended_at_once)
        active = slots.active
        if not active:
            break
        anchors = slots.lengths - 1
        longest = max(slots.host_lengths[slot] for slot in active)
        limit = min(longest + slots.num_draft_tokens, slots.max_length)
        anchors = anchors.clamp(max=longest - 1)
        anchor_tokens = slots.tokens.gather(1, anchors[:, None])
        draft_tokens, draft_probs = anchor_tokens[:, :0], None
        if drafter is not None:
            proposal = drafter.propose(slots.state, anchor_tokens, anchors[:, None], limit, slots.chooser(anchors))
            draft_tokens = proposal.tokens[:, 0]
            draft_probs = None if proposal.probs is None else proposal.probs[:, 0]
        inputs = torch.cat([anchor_tokens, draft_tokens], dim=1)
        positions = anchors[:, None] + torch.arange(inputs.shape[1], device=inputs.device)
        features, states = target.forward_cached(inputs, positions, slots.cache, limit, slots.layer_ids())
        num_accepted, after = _verify(slots, anchors, draft_tokens, draft_probs, target.logits(states))
        count, ended = _commit(slots, draft_tokens, num_accepted, after)
        if drafter is not None:
            drafter.extend(slots.state, features, positions, slots.tokens)
            record.append(_recorded(slots, active, anchors, draft_tokens, num_accepted, states))
        slots.lengths = slots.lengths + count
        # The one host sync of the round: how far each row came, which ended, and what was accepted.
        progress = torch.stack([slots.lengths, ended.long(), num_accepted], dim=1).tolist()
        for slot, (length, end, accepted) in enumerate(progress):
            if slots.prompt_of[slot] is None:
                continue
            committed = length - slots.host_lengths[slot]
            runs[slots.prompt_of[slot]].append(min(accepted, committed))
            committed_tokens += committed
            slots.host_lengths[slot] = length
            if end:
                finish([slot])
        verifications += len(active)
        if on_round is not None:
            on_round(finished, committed_tokens, verifications)
    return _assemble(slots, texts, record)


def _drawn_seeds(count: int, generator: torch.Generator | None) -> list[int]:
    device = None if generator is None else generator.device
    return torch.randint(2**62, (count,), generator=generator, device=device).tolist()


def _recorded(slots: _Slots, active: list[int], anchors, draft_tokens, num_accepted, states):
    """The round's blocks of active rows; how many slots lie inside the text is known once it has ended."""
    index = torch.tensor(active, device=anchors.device)
    rows = torch.tensor([slots.prompt_of[slot] for slot in active], device=anchors.device)
    accepted = num_accepted[index]
    blocks = DraftBlocks(rows, anchors[index], draft_tokens[index], accepted, accepted)
    return blocks, states[index, :-1] if slots.settings.keep_states else None


def _assemble(slots: _Slots, texts: list[torch.Tensor], record: list) -> Rollout:
    lengths = torch.tensor([len(text) for text in texts], device=slots.tokens.device)
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=slots.settings.pad_token_id)
    prompt_lengths = torch.tensor([len(prompt) for prompt in slots.prompts], device=slots.tokens.device)
    rollout = Rollout(tokens, prompt_lengths, lengths)
    if slots.drafter is None:
        return rollout
    if not record:
        rollout.blocks = DraftBlocks.empty(slots.num_draft_tokens, tokens.device)
        return rollout
    blocks = DraftBlocks.cat([part for part, _ in record])
    order = torch.argsort(blocks.texts * slots.max_length + blocks.anchors)
    blocks = blocks.select(order)
    blocks.num_valid = num_valid_slots(blocks.anchors, lengths[blocks.texts], slots.num_draft_tokens)
    blocks.num_accepted = torch.minimum(blocks.num_accepted, blocks.num_valid)
    rollout.blocks = blocks
    if slots.settings.keep_states:
        rollout.block_states = torch.cat([states for _, states in record])[order]
    return rollout
