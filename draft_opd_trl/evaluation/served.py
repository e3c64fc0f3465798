"""A running engine measured: prompts sent to it, and what it says of its own verifications, with intervals.

An engine that tells with each answer is measured text by text. Of one that only counts, the counters are read around
each batch of prompts, and a batch is the least that can be told apart. Knows no models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core.endpoint import ServerError
from ..decoding.acceptance import LEVEL, RESAMPLES, interval_of, resampled
from ..texts.engine_counts import Counters, EngineStats, Verified
from ..texts.server import Answer, CompletionsClient
from .results import LinesFile


# Tokens asked for to see what an engine tells.
PROBE_TOKENS = 16


@dataclass
class Part:
    """
    Texts whose verifications the engine tells together.

    Args:
        texts (`list[int]`): Their prompts' places.
        completions (`list[list[int]]`): Token ids, stop tokens included.
        committed (`int`): Tokens that verifications committed: all but the first of each text.
        verifications (`int`), by_slot (`list[int]`): As in [`Verified`].
        num_draft_tokens (`int`): K.
        seconds (`float`): Wall time since the part before.
        others (`int`): Tokens and requests that were counted meanwhile, and are not ours.
    """

    texts: list[int]
    completions: list[list[int]]
    committed: int
    verifications: int
    by_slot: list[int]
    num_draft_tokens: int
    seconds: float
    others: int = 0


@dataclass
class ServedReport:
    """
    What an engine said over a set of prompts.

    Args:
        parts (`list[Part]`): By their first text.
        by_answer (`bool`): A part is a text, told with its answer; else a batch, told by counters.
        cached (`int`, *optional*): Prompt tokens out of the prefix cache in this run, where they are counted.
    """

    parts: list[Part]
    by_answer: bool
    cached: int | None = None

    @property
    def completions(self) -> list[list[int]]:
        """By prompt."""
        found = {text: ids for part in self.parts for text, ids in zip(part.texts, part.completions, strict=True)}
        return [found[text] for text in sorted(found)]

    @property
    def num_draft_tokens(self) -> int:
        return max(part.num_draft_tokens for part in self.parts)

    @property
    def others(self) -> int:
        return sum(part.others for part in self.parts)

    @property
    def committed(self) -> torch.Tensor:
        """By part, float64 `(U,)`."""
        return torch.tensor([part.committed for part in self.parts], dtype=torch.float64)

    @property
    def verifications(self) -> torch.Tensor:
        """By part, float64 `(U,)`."""
        return torch.tensor([part.verifications for part in self.parts], dtype=torch.float64)

    @property
    def acceptance_length(self) -> float:
        """τ as [`AcceptanceReport`] counts it."""
        return float(self.committed.sum() / self.verifications.sum().clamp(min=1))

    def by_part(self, counts: Sequence[int]) -> torch.Tensor:
        """Counts by text, summed by part: float64 `(U,)`."""
        return torch.tensor([sum(counts[text] for text in part.texts) for part in self.parts], dtype=torch.float64)

    def summary(self) -> dict[str, Any]:
        """The numbers a results file wants, JSON-able; intervals are `None` where there is one part only."""
        slots = self.num_draft_tokens if all(part.by_slot for part in self.parts if part.verifications) else 0
        accepted = [[part.by_slot[slot] if part.by_slot else 0 for part in self.parts] for slot in range(slots)]
        numerators = torch.stack([self.committed, *torch.tensor(accepted, dtype=torch.float64)])
        denominators = self.verifications.expand_as(numerators)
        values = (numerators.sum(1) / denominators.sum(1).clamp(min=1)).tolist()
        spread = resampled(numerators.T, denominators.T, RESAMPLES, seed=0)
        several = len(self.parts) > 1
        intervals = [list(interval_of(one, LEVEL)) if several else None for one in spread.T]
        tokens, seconds = sum(map(len, self.completions)), sum(part.seconds for part in self.parts)
        return {
            "acceptance_length": values[0],
            "interval": intervals[0],
            "acceptance_by_slot": values[1:],
            "intervals_by_slot": intervals[1:],
            "num_draft_tokens": self.num_draft_tokens,
            "verifications": int(self.verifications.sum()),
            "prompts": len(self.completions),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "told": "by answer" if self.by_answer else "by counters",
            "parts": len(self.parts),
            "others": self.others,
            "cached_prompt_tokens": self.cached,
        }


def measure_served(
    client: CompletionsClient,
    stats: EngineStats,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    file: Path | None = None,
    settings: dict[str, Any] | None = None,
    progress: str | None = None,
) -> ServedReport:
    """
    Send prompts to an engine and count what its verifications said.

    Args:
        client ([`CompletionsClient`]): Asks; its `concurrency` is how many prompts are under way at once, and the
            size of a batch where only counters tell.
        stats ([`EngineStats`]): Of the same server.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        seeds (`Sequence[int]`): One a prompt, for engines that heed it.
        file (`Path`, *optional*): Parts are appended as they end; what is there is not asked for again.
        settings (`dict`, *optional*): What the results depend on beside these; JSON-able.
        progress (`str`, *optional*): Label of a progress bar with throughput and acceptance length.

    Raises:
        `ServerError`: It does not answer, does not speculate, or does not say what its verifications did.
        `ValueError`: The file holds results of other settings.
    """
    by_answer = _tells_by_answer(client, stats, prompts[0])
    told = {**(settings or {}), "concurrency": client.concurrency, "told": "by answer" if by_answer else "by counters"}
    lines = LinesFile(file, told)
    parts = [Part(**line) for line in lines.lines]
    done = {text for part in parts for text in part.texts}
    waiting = [text for text in range(len(prompts)) if text not in done]
    size = max(len(waiting), 1) if by_answer else client.concurrency
    report = ServedReport(parts, by_answer)
    with tqdm(total=len(prompts), initial=len(done), desc=progress, disable=progress is None, leave=False) as bar:
        for first in range(0, len(waiting), size):
            batch = waiting[first : first + size]
            before = stats.counters()
            ask = _by_answer if by_answer else _by_counters
            for part in ask(client, stats, [(text, prompts[text], seeds[text]) for text in batch], before):
                parts.append(part)
                lines.append_line(asdict(part))
                bar.update(len(part.texts))
                speed = sum(map(len, report.completions)) / max(sum(one.seconds for one in parts), 1e-9)
                bar.set_postfix_str(f"τ {report.acceptance_length:.2f}, {speed:.0f} tok/s", refresh=False)
            counted = stats.counters() - before
            report.cached = None if counted.cached is None else (report.cached or 0) + counted.cached
    parts.sort(key=lambda part: part.texts)
    return report


def _tells_by_answer(client: CompletionsClient, stats: EngineStats, prompt: Sequence[int]) -> bool:
    """
    Whether answers come with what verification said of them.

    Raises:
        `ServerError`: The engine does not speculate, or tells nowhere.
    """
    longest, client.max_new_tokens = client.max_new_tokens, min(PROBE_TOKENS, client.max_new_tokens)
    try:
        [(_, answer)] = [pair for group in client.stream([prompt], [0]) for pair in group]
    finally:
        client.max_new_tokens = longest
    if answer is not None and answer.token_ids is None:
        raise ServerError(
            f"{client.url} returns no token ids, so its tokens cannot be counted. Serve with vLLM or SGLang, of a "
            "version that knows `return_token_ids`."
        )
    if answer is not None and answer.verified is not None:
        return True
    if stats.counters().verifications is not None:
        return False
    if stats.settings.get("speculative_algorithm"):
        raise ServerError(
            f"{client.url} speculates ({stats.settings['speculative_algorithm']}), but neither its answers nor "
            "/metrics say how. Start SGLang with --enable-metrics."
        )
    raise ServerError(
        f"{client.url} does not speculate: neither its answers nor /metrics count a verification. Start it with the "
        "command that `draft-opd inspect DRAFTER --target TARGET` prints."
    )


Asked = tuple[int, Sequence[int], int]  # a prompt's place, its ids, its seed


def _answers(client: CompletionsClient, asked: Sequence[Asked]) -> Iterator[tuple[int, Answer]]:
    """As they arrive, by the prompt's place."""
    texts, prompts, seeds = zip(*asked, strict=True)
    for group in client.stream(prompts, seeds):
        for index, answer in group:
            yield texts[index], answer


def _completion(answer: Answer, stops: Sequence[int]) -> list[int]:
    """Its token ids, with the stop token that some engines leave out."""
    ids = list(answer.token_ids or [])
    missing = answer.stopped and answer.stop_token_id is not None and ids[-1:] != [answer.stop_token_id]
    return [*ids, answer.stop_token_id] if missing and answer.num_tokens != len(ids) else ids


def _by_answer(
    client: CompletionsClient, stats: EngineStats, asked: Sequence[Asked], before: Counters
) -> Iterator[Part]:
    last = time.perf_counter()
    for text, answer in _answers(client, asked):
        now, ids = time.perf_counter(), _completion(answer, client.stop_token_ids)
        if answer.verified is None and len(ids) > 1:
            raise ServerError(
                f"{client.url} tells with some answers what verification said, and with the one to prompt {text} it "
                "does not. Where several engines are behind the address, start them alike, or ask one of them."
            )
        verified = answer.verified or Verified(0)  # a text of one token comes from the prefill
        yield Part(
            [text],
            [ids],
            max(len(ids) - 1, 0),
            verified.verifications,
            verified.by_slot,
            verified.num_draft_tokens or 0,
            now - last,
        )
        last = now


def _by_counters(
    client: CompletionsClient, stats: EngineStats, asked: Sequence[Asked], before: Counters
) -> Iterator[Part]:
    began = time.perf_counter()
    answers = dict(sorted(_answers(client, asked)))
    seconds = time.perf_counter() - began
    counted = stats.since(before, len(asked))
    completions = [_completion(answer, client.stop_token_ids) for answer in answers.values()]
    tokens = sum(map(len, completions))
    requests, written = counted.requests, counted.tokens
    others = max((requests or 0) - len(asked), 0) + max((tokens if written is None else written) - tokens, 0)
    yield Part(
        list(answers),
        completions,
        sum(max(len(ids) - 1, 0) for ids in completions),
        counted.verifications or 0,
        counted.by_slot,
        len(counted.by_slot),
        seconds,
        others,
    )
