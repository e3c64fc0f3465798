"""Rows of prompts → texts the target wrote, whoever writes them down: the sources of text, and the one a config names.

A source is an object with one method, `write`. Knows no losses and no optimizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .config import DraftOPDConfig
from .consistency import TextFit, describe_misfit, likeliest_next, text_fit
from .drafters.base import Drafter
from .records import Rollout
from .server import Answer, CompletionsClient, ServerError
from .speculation import SpeculationSettings, seed_of, speculate
from .target import Target
from .text_cache import TextCache


# Takes a metric's name and value.
Log = Callable[[str, float], None]
# A server many of whose texts are wrong serves something else; one of many may be an odd tokenisation.
MAX_DROPPED = 0.2
# Texts of a server before it is judged, and those it is judged by: enough to tell another law, too few for the last
# bits of another kernel to add up.
MIN_JUDGED, MAX_JUDGED = 16, 64


class RolloutSource(Protocol):
    """Where texts come from."""

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """
        Texts for tokenised rows.

        Args:
            rows (`list[dict]`): With `prompt_ids` (and `completion_ids`, if those are what is read).
            draw (`int`, *optional*, defaults to `0`): At temperature > 0 each draw of a prompt is another text.

        Returns:
            [`Rollout`] on the target's device, in the order of `rows`.
        """


def until_stop(completion: Sequence[int], stop_token_ids: Sequence[int]) -> list[int]:
    """A completion up to its first stop token: nothing after it would ever be verified."""
    ends = [index for index, token in enumerate(completion) if token in stop_token_ids]
    return list(completion[: ends[0] + 1] if ends else completion)


class DatasetSource:
    """Reads `completion_ids`, cut where decoding would have ended: at `max_new_tokens` or the first stop token."""

    def __init__(self, target: Target, settings: SpeculationSettings) -> None:
        self.target, self.settings = target, settings

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        settings = self.settings
        completions = [
            until_stop(row["completion_ids"][: settings.max_new_tokens], settings.stop_token_ids) for row in rows
        ]
        return Rollout.from_ids(_prompts(rows), completions, settings.pad_token_id, self.target.device)


class DecodingSource:
    """
    The target writes in this process: sped up by a drafter, whose blocks are recorded on the way, or alone.

    A text depends on the seed, the draw and its prompt alone, so a resumed run continues with the same texts.
    """

    def __init__(self, target: Target, drafter: Drafter | None, settings: SpeculationSettings, seed: int) -> None:
        self.target, self.drafter, self.seed = target, drafter, seed
        self.settings = settings if drafter is not None else replace(settings, keep_states=False)

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        prompts = _prompts(rows)
        seeds = [seed_of(self.seed, draw, prompt) for prompt in prompts]
        return speculate(self.target, self.drafter, prompts, self.settings, seeds=seeds)


class ServerSource:
    """
    A server writes, and the target reads every text once before it is trusted.

    Where the server returns no token ids, its text is tokenised again, and must have as many tokens as the server
    counted. A text that ends neither in a stop token nor at its limit, or that the target would not have written
    ([`TextFit`]), is dropped like one of another count, and the target writes it in this process.

    Args:
        client ([`CompletionsClient`]): Asks the server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        fallback ([`DecodingSource`]): The target alone, for texts that were dropped.
        keep (`Callable`): Called as `keep(prompts, completions, draw)` with texts as they arrive.
        log (`Callable`): Takes a metric's name and value.
        progress (`bool`): Show a progress bar.
    """

    def __init__(
        self,
        client: CompletionsClient,
        tokenizer: PreTrainedTokenizerBase,
        fallback: DecodingSource,
        keep: Callable[[list[list[int]], list[list[int]], int], None],
        log: Log,
        progress: bool = False,
    ) -> None:
        self.client, self.tokenizer, self.fallback = client, tokenizer, fallback
        self.target, self.settings = fallback.target, fallback.settings
        self.keep, self.log, self.progress = keep, log, progress
        self.judged = self.dropped = 0
        self.fits: list[TextFit] = []

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """
        See [`RolloutSource`].

        Raises:
            `ServerError`: The server failed for good.
            `RuntimeError`: A fifth of its texts had to be dropped, or they follow another law than the target's.
        """
        prompts = _prompts(rows)
        seeds = [seed_of(self.fallback.seed, draw, prompt) for prompt in prompts]
        texts: dict[int, list[int]] = {}
        held: list[int] = []  # arrived, but the server has not been judged yet

        def keep_held() -> None:
            self.keep([prompts[index] for index in held], [texts[index] for index in held], draw)
            held.clear()

        with tqdm(total=len(rows), desc="Server", disable=not self.progress, leave=False) as bar:
            try:
                for group in self.client.stream(prompts, seeds):
                    accepted = self._accepted(prompts, {i: answer for i, answer in group if answer is not None})
                    self._judge(len(group), len(group) - len(accepted))
                    texts |= accepted
                    held += accepted
                    if self.judged >= MIN_JUDGED:
                        keep_held()
                    bar.update(len(group))
                    tokens = sum(map(len, texts.values()))
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
            except ServerError as error:
                keep_held()
                raise ServerError(
                    f"{error} {len(texts)} of {len(rows)} texts had arrived; they are in the text cache and are not "
                    "asked for again."
                ) from error
        dropped = [index for index in range(len(rows)) if index not in texts]
        self.log("rollout/dropped", len(dropped) / len(rows))
        if dropped:
            written = self.fallback.write([rows[index] for index in dropped], draw).completions()
            texts |= dict(zip(dropped, written, strict=True))
        completions = [texts[index] for index in range(len(rows))]
        return Rollout.from_ids(prompts, completions, self.settings.pad_token_id, self.target.device)

    def _accepted(self, prompts: list[list[int]], answers: dict[int, Answer]) -> dict[int, list[int]]:
        """Completions that agree with what the server counted and with the target."""
        completions = {i: self._tokens(answer) for i, answer in answers.items()}
        open_ends = [i for i, answer in answers.items() if self._lacks_stop(answer, completions[i])]
        if open_ends:
            texts = self._rollout([prompts[i] for i in open_ends], [completions[i] for i in open_ends])
            likeliest = likeliest_next(self.target, texts, list(self.settings.stop_token_ids))
            for i, guess in zip(open_ends, likeliest, strict=True):
                told = answers[i].stop_token_id
                completions[i] = [*completions[i], guess if told is None else told]
        whole = [i for i, completion in completions.items() if self._is_whole(answers[i], completion)]
        if not whole:
            return {}
        texts = self._rollout([prompts[i] for i in whole], [completions[i] for i in whole])
        fit = text_fit(self.target, texts, self.settings.sampling)
        fits = fit.is_targets(self.settings.sampling)
        if sum(len(part) for part in self.fits) < MAX_JUDGED:
            self.fits.append(fit.select(fits))
        return {i: completions[i] for i, kept in zip(whole, fits.tolist(), strict=True) if kept}

    def _tokens(self, answer: Answer) -> list[int]:
        if answer.token_ids is not None:
            return list(answer.token_ids)
        return self.tokenizer(answer.text, add_special_tokens=False)["input_ids"]

    def _lacks_stop(self, answer: Answer, completion: list[int]) -> bool:
        """Engines leave the stop token out of the text, and some out of the token ids."""
        return answer.stopped and not (completion and completion[-1] in self.settings.stop_token_ids)

    def _is_whole(self, answer: Answer, completion: list[int]) -> bool:
        stops = self.settings.stop_token_ids
        counted = answer.token_ids is not None or answer.num_tokens in (None, len(completion))
        ended = len(completion) == self.settings.max_new_tokens or any(token in stops for token in completion[-1:])
        return counted and ended and until_stop(completion, stops) == completion

    def _rollout(self, prompts: list[list[int]], completions: list[list[int]]) -> Rollout:
        return Rollout.from_ids(prompts, completions, self.settings.pad_token_id, self.target.device)

    def _judge(self, count: int, dropped: int) -> None:
        self.judged += count
        self.dropped += dropped
        if self.judged < MIN_JUDGED:
            return
        if self.dropped > MAX_DROPPED * self.judged:
            raise RuntimeError(
                f"{self.dropped} of {self.judged} texts of {self.client.url} had to be dropped: they are not what the "
                f"target writes with {self.settings.sampling}. Check that it serves this very target (model, "
                "revision, quantisation), and prefer a server that takes and returns token ids (vLLM, SGLang)."
            )
        misfit = describe_misfit(TextFit.cat(self.fits), self.settings.sampling)
        if misfit is not None:
            raise RuntimeError(f"{self.client.url}: {misfit}")


class CachedSource:
    """
    Reads texts from disk, and asks another source only for those that are not there.

    Args:
        source ([`RolloutSource`]): Writes what is missing.
        cache ([`TextCache`]): Keeps it.
        log (`Callable`): Takes a metric's name and value.
        pad_token_id (`int`), device (`torch.device`): For texts that are read.
    """

    def __init__(
        self,
        source: RolloutSource,
        cache: TextCache,
        log: Log,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        self.source, self.cache, self.log = source, cache, log
        self.pad_token_id, self.device = pad_token_id, device

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """See [`RolloutSource`]. Texts come with blocks only if all of them were just written by speculation."""
        prompts = _prompts(rows)
        texts = self.cache.find(prompts, draw)
        missing = [index for index, text in enumerate(texts) if text is None]
        self.log("rollout/cached", 1 - len(missing) / len(rows))
        if missing:
            rollout = self.source.write([rows[index] for index in missing], draw)
            written = rollout.completions()
            self.cache.add([prompts[index] for index in missing], written, draw)
            if len(missing) == len(rows):
                return rollout
            for index, text in zip(missing, written, strict=True):
                texts[index] = text
        return Rollout.from_ids(prompts, texts, self.pad_token_id, self.device)


def build_source(
    args: DraftOPDConfig,
    target: Target,
    drafter: Drafter,
    tokenizer: PreTrainedTokenizerBase,
    settings: SpeculationSettings,
    log: Log,
    progress: bool = False,
) -> RolloutSource:
    """
    The source that `args.rollout_source` names, behind a text cache unless texts come from the data set.

    Args:
        args ([`DraftOPDConfig`]): Which source, the server, the cache, the seed.
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        settings ([`SpeculationSettings`]): Law and lengths.
        log (`Callable`): Takes a metric's name and value.
        progress (`bool`, *optional*, defaults to `False`): Show progress of slow sources.
    """
    if args.rollout_source == "dataset":
        return DatasetSource(target, settings)
    cache = TextCache(
        args.text_cache_dir or Path(args.output_dir) / "_text_cache",
        _text_settings(args, target, tokenizer, settings),
    )
    source = DecodingSource(target, drafter if args.rollout_source == "speculation" else None, settings, args.seed)
    if args.rollout_source == "server":
        client = CompletionsClient(
            args.server_url,
            settings.sampling,
            settings.max_new_tokens,
            settings.stop_token_ids,
            lambda ids: _faithful_text(tokenizer, ids),
            args.server_model,
            args.server_token,
            args.server_timeout,
            args.server_concurrency,
            args.server_max_retries,
        )
        source = ServerSource(client, tokenizer, source, cache.add, log, progress)
    return CachedSource(source, cache, log, settings.pad_token_id, target.device)


def _prompts(rows: list[dict]) -> list[list[int]]:
    return [row["prompt_ids"] for row in rows]


def _faithful_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str | None:
    """A text that the tokenizer turns into exactly these ids; it may put the first of them (bos) there by itself."""
    for start in (0, 1):
        text = tokenizer.decode(ids[start:], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == list(ids):
            return text
    return None


def _text_settings(
    args: DraftOPDConfig, target: Target, tokenizer: PreTrainedTokenizerBase, settings: SpeculationSettings
) -> dict:
    """What decides a text beside its prompt; at temperature 0 there is one text, whatever the seed."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    sampling = {"temperature": 0.0}
    if not settings.sampling.greedy:
        sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "seed")}
    return {
        "target": f"{Path(target.name).name}@{target.fingerprint()}",
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "chat_template_kwargs": args.chat_template_kwargs,
        "max_new_tokens": settings.max_new_tokens,
        "stop_token_ids": sorted(settings.stop_token_ids),
        **sampling,
    }
