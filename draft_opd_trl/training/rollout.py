"""Who writes the texts of a run: the source that its settings name, behind the cache of what was written before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..core.state_store import StateStore
from ..core.target import Target
from ..decoding.speculation import SpeculationSettings
from ..drafters.base import Drafter
from ..texts.engine_counts import EngineStats
from ..texts.server import CompletionsClient
from ..texts.server_source import ServerSource
from ..texts.sources import CachedSource, DatasetSource, DecodingSource, Log, RolloutSource
from ..texts.text_cache import TextCache
from .config import DraftOPDConfig


# Seconds that a server's page of counters may take.
STATS_TIMEOUT = 10.0


def text_folder(args: DraftOPDConfig) -> Path:
    """Where the texts of a run are kept."""
    return Path(args.text_cache_dir or Path(args.output_dir) / "_text_cache")


def state_store(args: DraftOPDConfig, target: Target, drafter: Drafter) -> StateStore | None:
    """Where the states of texts are kept, if they are."""
    if not args.state_store_gib:
        return None
    dtype = args.state_store_dtype and getattr(torch, args.state_store_dtype)
    return StateStore(target, drafter.target_layer_ids, args.state_store_gib, args.state_store_dir, dtype)


def build_source(
    args: DraftOPDConfig,
    target: Target,
    drafter: Drafter | None,
    tokenizer: PreTrainedTokenizerBase,
    settings: SpeculationSettings,
    log: Log,
    progress: bool = False,
) -> RolloutSource:
    """
    The source that `args.rollout_source` names, behind a text cache unless texts come from the data set.

    Args:
        args ([`DraftOPDConfig`]): Which source, the server, the cache, the seed.
        target ([`Target`]), drafter ([`Drafter`], *optional*): Bound to each other. Only speculation needs the second.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        settings ([`SpeculationSettings`]): Law and lengths.
        log (`Callable`): Takes a metric's name, and how many of how many.
        progress (`bool`, *optional*, defaults to `False`): Show progress of slow sources.
    """
    if args.rollout_source == "dataset":
        return DatasetSource(target, settings)
    cache = TextCache(
        text_folder(args),
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
            model=args.server_model,
            token=args.server_token,
            timeout=args.server_timeout,
            concurrency=args.server_concurrency,
            max_retries=args.server_max_retries,
        )
        # Asked beside the texts, and so not for long.
        stats = partial(EngineStats, args.server_url, args.server_token, timeout=STATS_TIMEOUT, max_retries=0)
        source = ServerSource(client, tokenizer, source, cache.add, log, progress, stats)
    return CachedSource(source, cache, log, settings.pad_token_id, target.device)


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
