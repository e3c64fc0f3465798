"""Greedy texts under speculation, held token for token to what transformers' own `generate` writes with the target.

Drafters: the shipped ones, untrained ones, and ones that propose what is right, what is wrong, or a mixture, so that
blocks end in every way. Stop tokens are drawn from the texts themselves, so that they fall inside blocks.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from random import Random
from typing import Any

import torch
from forked import Died, forked
from tqdm.auto import tqdm
from world import DRAFTERS, world

from draft_opd_trl import SpeculationSettings, speculate
from draft_opd_trl.drafters.base import Proposal


TEXTS = 10_000
LENGTH = 48
PROMPTS = 768
# Untrained drafters, by the options they are made with.
RANDOM = {
    "dflash of 2, untrained": ("dflash", {"block_size": 2, "target_layer_ids": [0]}),
    "dflash of 16, untrained": ("dflash", {"block_size": 16, "target_layer_ids": [0, 2]}),
    "eagle3 of 3, untrained": ("eagle3", {"num_draft_tokens": 3}),
    "dspark of 4, untrained": ("dspark", {"block_size": 4, "target_layer_ids": [0, 2], "markov_rank": 8}),
    "causal_lm of 3, untrained": ("causal_lm", {"num_draft_tokens": 3, "num_hidden_layers": 1}),
}
# Made-up drafters, by how many proposals they take and the share of these that is wrong.
SCRIPTED = {f"scripted, {share:.0%} wrong, {k} a block": (k, share) for k in (1, 5, 13) for share in (0.0, 0.2, 1.0)}


class ScriptedDrafter:
    """
    Proposes the target's own text, but for a drawn share of slots, where it proposes another token.

    Args:
        texts (`dict[tuple, list[int]]`): Prompt → completion.
        num_draft_tokens (`int`): K.
        wrong (`float`): Share.
        draws ([`random.Random`]): Which slots, and which tokens.
    """

    vocab_map = None
    target_layer_ids = (0,)

    def __init__(self, texts: dict[tuple, list[int]], num_draft_tokens: int, wrong: float, draws: Random) -> None:
        self.texts, self.num_draft_tokens, self.wrong, self.draws = texts, num_draft_tokens, wrong, draws
        self.vocabulary = world().target.vocab_size

    def start(self, batch_size: int, max_length: int) -> list[list[int]]:
        return [[] for _ in range(batch_size)]

    def extend(self, state, features, positions, tokens, lanes=None) -> None:
        """Remembers what each lane holds; whoever wrote it, its prompt says how it goes on."""
        for lane, line in zip(range(len(state)) if lanes is None else lanes.tolist(), tokens.tolist(), strict=True):
            state[lane] = line

    def propose(self, state, tokens, anchors, limit, choose) -> Proposal:
        return Proposal(
            torch.tensor([[self._block(state[lane], int(a)) for a in line] for lane, line in enumerate(anchors)])
        )

    def _block(self, line: list[int], anchor: int) -> list[int]:
        # A free place may hold a text of which no prompt is left; its proposals do not matter.
        size = next((n for n in range(1, anchor + 1) if tuple(line[:n]) in self.texts), 0)
        block = self.texts.get(tuple(line[:size]), [])[anchor + 1 - size :][: self.num_draft_tokens]
        block = block + [self.draws.randrange(self.vocabulary) for _ in range(self.num_draft_tokens - len(block))]
        shift = self.draws.randrange(1, self.vocabulary)
        return [(t + shift) % self.vocabulary if self.draws.random() < self.wrong else t for t in block]


@dataclass
class Job:
    """
    Texts to write at once.

    Args:
        seed (`int`): Of what is drawn for it.
        drafter (`str`): Its name.
        batch_size (`int`): Rows side by side; twice as many texts are written, so that free places are taken again.
    """

    seed: int
    drafter: str
    batch_size: int


def _references(prompts: list[list[int]]) -> list[list[int]]:
    """What `generate` writes; prompts of one length at once, so that nothing is padded."""
    groups = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[len(prompt)].append(index)
    texts: list[list[int]] = [[] for _ in prompts]
    for length, indices in tqdm(groups.items(), desc="references", unit="batch"):
        same = torch.tensor([prompts[index] for index in indices])
        written = world().model.generate(
            same, attention_mask=torch.ones_like(same), max_new_tokens=LENGTH, do_sample=False, pad_token_id=0
        )
        for index, text in zip(indices, written[:, length:].tolist(), strict=True):
            texts[index] = _until(text, world().stops)
    return texts


def _until(text: list[int], stops: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(text) if token in stops), len(text))
    return text[: end + 1]


@cache
def _drafter(name: str, seed: int) -> Any:
    if name in RANDOM:
        kind, options = RANDOM[name]
        return world().random(kind, seed, **options)
    return world().shipped(name)


def _write(job: Job, texts: dict[tuple, list[int]]) -> tuple[int, list[str]]:
    """Texts of a job, and those that changed, in words."""
    draws = Random(job.seed)
    prompts = draws.choices(list(texts), k=2 * job.batch_size)
    stops = list(world().stops)
    for prompt in draws.sample(prompts, min(draws.randrange(3), len(prompts))):
        stops.append(draws.choice(texts[prompt]))
    length = draws.choice((1, 2, 7, LENGTH, LENGTH, LENGTH))
    if job.drafter in SCRIPTED:
        drafter = ScriptedDrafter(texts, *SCRIPTED[job.drafter], draws)
    else:
        drafter = _drafter(job.drafter, 0)
    settings = SpeculationSettings(length, stops, batch_size=job.batch_size)
    rollout = speculate(world().target, drafter, [list(prompt) for prompt in prompts], settings)
    changed = []
    for prompt, ours in zip(prompts, rollout.completions(), strict=True):
        theirs = _until(texts[prompt][:length], stops)
        if ours != theirs:
            changed.append(f"{job}, stops {stops}, length {length}, prompt {list(prompt)}: {ours}, not {theirs}")
    return len(prompts), changed


def run(
    seconds: float, report: Callable[[str], None], seed: int = 0, scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """
    Write texts and hold them to the target's own.

    Args:
        seconds, report, seed, scale, workers: As in `kills.run`; `scale` is a share of 10 000 texts.

    Returns:
        `texts` and of these `texts_changed`.
    """
    start = time.monotonic()
    wanted = max(round(TEXTS * scale), 20)
    count = min(max(wanted // 8, 12), PROMPTS)
    prompts = world().prompts[:count]
    texts = {tuple(p): text for p, text in zip(prompts, _references(prompts), strict=True)}
    names = [*DRAFTERS, *RANDOM, *SCRIPTED]
    for name in (*DRAFTERS, *RANDOM):
        _drafter(name, 0)
    draws = Random(seed)
    most = 64 if wanted > 1000 else 4
    # A few of every size, and many of small ones, where texts are seldom alike.
    jobs = (
        Job(draws.randrange(2**32), names[number % len(names)], draws.choice((1, 2, 3, draws.randint(1, most), most)))
        for number in range(wanted)
    )
    done, changed = 0, 0
    with tqdm(total=wanted, desc="texts", unit="text") as bar:
        for job, told in forked(partial(_write, texts=texts), jobs, start + seconds, workers, limit=120.0):
            count, wrong = (2 * job.batch_size, [f"{job}: {told}"]) if isinstance(told, Died) else told
            for line in wrong[: max(20 - changed, 0)]:
                report(f"changed: {line}")
            done += count
            changed += len(wrong)
            bar.update(count)
            if done >= wanted:
                break
    return {"texts": done, "texts_changed": changed}
