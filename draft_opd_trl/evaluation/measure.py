"""Acceptance length by real speculative decoding, timed, and held to the target's own greedy text.

Knows no training state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core.seeding import seed_of
from ..core.stopwatch import Stopwatch
from ..core.target import Target
from ..decoding.acceptance import AcceptanceReport, difference, join_reports, speedup_interval
from ..decoding.speculation import SpeculationSettings, speculate
from ..drafters.base import Drafter
from .best_k import advice
from .by_replay import Writer, measure_by_replay
from .report import save_report
from .results import ResultsFile, fingerprint_of
from .round_costs import serving_choices


class _Timed:
    """A target or a drafter, some of whose methods are timed. Speculation itself knows no clock."""

    def __init__(self, subject: Any, stopwatch: Stopwatch, phase: str, methods: Sequence[str]) -> None:
        self._subject = subject
        for name in methods:
            setattr(self, name, stopwatch.timed(phase, getattr(subject, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._subject, name)


def measure_acceptance(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    generator: torch.Generator | None = None,
    progress: str | None = None,
    on_text: Callable[[int, AcceptanceReport], None] | None = None,
    seeds: Sequence[int] | None = None,
) -> AcceptanceReport:
    """
    Decode `prompts` speculatively and report what verification said.

    Args:
        target ([`Target`]), drafter ([`Drafter`], *optional*): Bound to each other; without a drafter it is plain
            decoding by the same engine, to compare speeds and texts with.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        settings ([`SpeculationSettings`]): Law and lengths; must be those the drafter will serve under.
        generator (`torch.Generator`, *optional*): At temperature > 0.
        progress (`str`, *optional*): Label of a progress bar with throughput and acceptance length.
        on_text (`Callable`, *optional*): Called as soon as a text has ended, as `on_text(prompt, report)`, with the
            report of this text alone. Its seconds are those since the text that ended before.
        seeds (`Sequence[int]`, *optional*): One a prompt, instead of a generator; see [`speculate`].
    """
    stopwatch = Stopwatch(target.device)
    timed_target = _Timed(target, stopwatch, "verify", ("forward_cached", "logits"))
    timed_drafter = None if drafter is None else _Timed(drafter, stopwatch, "draft", ("propose", "extend"))
    num_draft_tokens = 0 if drafter is None else drafter.num_draft_tokens
    reports: list[AcceptanceReport] = [None] * len(prompts)
    start = last = time.perf_counter()

    def end_text(prompt: int, completion: list[int], accepted: list[int]) -> None:
        nonlocal last
        now = time.perf_counter()
        stopped = completion[-1] in settings.stop_token_ids
        spent = stopwatch.read()
        times = (now - last, spent.get("draft", 0.0), spent.get("verify", 0.0))
        reports[prompt] = AcceptanceReport(num_draft_tokens, [completion], [accepted], [stopped], *times)
        if on_text is not None:
            on_text(prompt, reports[prompt])
        last = time.perf_counter()

    with tqdm(total=len(prompts), desc=progress, disable=progress is None, leave=False) as bar:

        def on_round(finished: int, committed: int, verifications: int) -> None:
            if finished > bar.n:
                speed = committed / (time.perf_counter() - start)
                bar.set_postfix_str(f"τ {committed / verifications:.2f}, {speed:.0f} tok/s", refresh=False)
                bar.update(finished - bar.n)

        speculate(timed_target, timed_drafter, prompts, settings, generator, on_round, end_text, seeds)
    return join_reports(reports)


# Which of two nearly equal logits comes out larger depends on the shape of the matrix product.
TIE_ROUNDINGS = 4


def changed_texts(
    target: Target, prompts: Sequence[Sequence[int]], plain: AcceptanceReport, report: AcceptanceReport
) -> dict[str, Any]:
    """
    Where greedy speculation wrote another text than greedy decoding without a drafter, which it must not.

    In float32 no text may differ. In bfloat16 two tokens often share the largest logit to within rounding, and the
    shape of a batch decides between them; so the first differing tokens' logits are compared, and texts that part at a
    tie are counted apart.

    Args:
        target ([`Target`]): That wrote both.
        prompts (`Sequence[Sequence[int]]`): Of both.
        plain, report ([`AcceptanceReport`]): Of decoding without and with a drafter, at temperature 0.

    Returns:
        `dict`: `checked` texts, `changed`, of these `at_ties` (logits within 4 roundings of the target's dtype), and
        the `largest_gap` between the logits of the tokens that differ.
    """
    gaps, ties = [], 0
    for prompt, first, second in zip(prompts, plain.completions, report.completions, strict=True):
        if first == second:
            continue
        same = next(i for i, (ours, theirs) in enumerate(zip(first, second, strict=False)) if ours != theirs)
        text = torch.tensor([[*prompt, *first[:same]]], device=target.device)
        logits = target.logits(target.forward_text(text, ())[1][0, -1]).float()
        gaps.append(float((logits[first[same]] - logits[second[same]]).abs()))
        ties += gaps[-1] <= TIE_ROUNDINGS * torch.finfo(target.dtype).eps * float(logits.abs().max())
    return {"checked": len(prompts), "changed": len(gaps), "at_ties": ties, "largest_gap": max(gaps, default=0.0)}


def fingerprint(drafter: Drafter) -> str:
    """Of a drafter's weights and layout, so that results of one drafter are not taken for another's."""
    digest = hashlib.sha256(f"{drafter.num_draft_tokens} {drafter.target_layer_ids}".encode())
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def text_seeds(seed: int, prompts: Sequence[int]) -> list[int]:
    """A seed for each prompt of a data set, by its index: whatever else is decoded beside it, and when."""
    return [seed_of(seed, index) for index in prompts]


def _texts_of(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    seed: int,
    file: ResultsFile,
    progress: str | None,
    measure: Callable[..., AcceptanceReport],
) -> list[AcceptanceReport]:
    """By prompt, the report of its text alone. Those that `file` holds are not decoded again, the others go there."""
    waiting = [index for index in range(len(prompts)) if index not in file.done]
    if waiting:

        def keep(text: int, report: AcceptanceReport) -> None:
            file.append(waiting[text], report)

        missing = [prompts[index] for index in waiting]
        seeds = text_seeds(seed, waiting)
        measure(target, drafter, missing, settings, progress=progress, on_text=keep, seeds=seeds)
    return [file.done[index] for index in range(len(prompts))]


def decode_all(
    target: Target,
    runs: Mapping[str, Drafter | None],
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    seed: int,
    results: Path | None,
    progress: str | None,
    replay: bool,
    write: Writer | None = None,
) -> tuple[dict[str, list[AcceptanceReport]], dict[str, int]]:
    """
    By run, the report of each text alone, and how many were there already.

    Args:
        target ([`Target`]): Of all runs.
        runs (`Mapping[str, Drafter | None]`): Drafters by name, `None` to decode without one.
        prompts, settings, seed, results, progress, replay, write: As for [`evaluate_drafters`].

    Raises:
        `ValueError`: A results file holds results of other settings.
    """
    shared = {
        **dataclasses.asdict(settings),
        "seed": seed,
        "target": target.name,
        "dtype": str(target.dtype),
        "device": target.device.type,
        "prompts": fingerprint_of(prompts)[:16],
        **({"by": "replay"} if replay else {}),
        **({"texts": "of a server"} if write else {}),
    }
    files = {
        name: ResultsFile(
            None if results is None else results.with_name(f"{results.name}-{_file_name(name)}.jsonl"),
            {**shared, "drafter": None if drafter is None else fingerprint(drafter)},
        )
        for name, drafter in runs.items()
    }
    resumed = {name: len(file.done) for name, file in files.items()}
    # What one drafter's texts were, the next one's are.
    measure = partial(measure_by_replay, write=write, known={}) if replay else measure_acceptance
    texts = {
        name: _texts_of(
            target, drafter, prompts, settings, seed, files[name], progress and f"{progress}, {name}", measure
        )
        for name, drafter in runs.items()
    }
    return texts, resumed


def evaluate_drafters(
    target: Target,
    drafters: dict[str, Drafter],
    prompts: Sequence[Sequence[int]],
    settings: SpeculationSettings,
    seed: int = 0,
    baseline: bool = True,
    results: Path | None = None,
    progress: str | None = None,
    replay: bool = False,
    ask_again: Callable[[list[list[int]]], list[list[int]]] | None = None,
    write: Writer | None = None,
    serve_batch_sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """
    Measure drafters on the same prompts, beside decoding without one.

    Args:
        target ([`Target`]): Of all drafters.
        drafters (`dict[str, Drafter]`): By name, bound to the target; two are compared, paired by prompt.
        prompts (`Sequence[Sequence[int]]`): Token ids.
        settings ([`SpeculationSettings`]): Law and lengths.
        seed (`int`, *optional*, defaults to `0`): Of draws at temperature > 0.
        baseline (`bool`, *optional*, defaults to `True`): Also decode plainly, for the speedup, and at temperature 0
            to check that no text changed.
        results (`Path`, *optional*): Start of the files' names, `<results>-<drafter>.jsonl`. Every text is appended as
            it ends. What is there already is not decoded again; texts cut off by a kill are, with the same draws, as
            these depend on the seed and the prompt's index alone. A table and pictures of the whole are written to
            `<results>.md` and `<results>.png`.
        progress (`str`, *optional*): Start of the progress bars' labels.
        replay (`bool`, *optional*, defaults to `False`): Let the target write the texts alone, and count by replay
            ([`measure_by_replay`]). There is no baseline then: the texts are the target's own, and no speed is told.
        ask_again (`Callable`, *optional*): Completions by prompt → prompts of a second turn, which are decoded too and
            counted with the first. All runs are asked the same: after the completions of plain decoding, or, without
            a baseline, of the first drafter.
        write (`Callable`, *optional*): Writes the texts along which replay counts, instead of the target in this
            process ([`measure_by_replay`]).
        serve_batch_sizes (`Sequence[int]`, *optional*): Batch sizes to say for how many proposals to serve with, from
            rounds that are timed here.

    Returns:
        JSON-able `dict`: `plain` (speed); `drafters` (by name the [`AcceptanceReport.summary`], `speedup` and its
        interval, `texts` from [`changed_texts`], how many were `resumed`, `serving` from [`advice`]); `difference` of
        τ and its interval.

    Raises:
        `ValueError`: A results file holds results of other settings.
    """
    runs = {"plain": None, **drafters} if baseline and not replay else drafters
    decode = partial(decode_all, target, runs, settings=settings, progress=progress, replay=replay, write=write)
    texts, resumed = decode(prompts, seed=seed, results=results)
    if ask_again is not None:
        asked = ask_again([report.completions[0] for report in texts[next(iter(runs))]])
        second = results and results.with_name(f"{results.name}-turn-2")
        later, known = decode(asked, seed=seed_of(seed, "turn 2"), results=second)
        texts = {name: texts[name] + later[name] for name in runs}
        resumed = {name: resumed[name] + known[name] for name in runs}
        prompts = [*prompts, *asked]
    reports = {name: join_reports(parts) for name, parts in texts.items()}
    plain = reports.pop("plain", None)
    serving = {
        name: advice(
            serving_choices(target, drafters[name], prompts, settings, report.acceptance_by_slot, serve_batch_sizes)
        )
        for name, report in reports.items()
    }
    if results is not None:
        save_report(dict(reversed(reports.items())), results, serving)  # differences are first − second
    # Side by side, a text's seconds are those of its neighbours too, and the texts are no sample of anything.
    alone = plain is not None and settings.batch_size == 1
    return {
        "prompts": len(prompts),
        "plain": plain and {"tokens_per_second": plain.tokens_per_second, "resumed": resumed["plain"]},
        "drafters": {
            name: {
                **report.summary(),
                "speedup": plain and report.tokens_per_second / plain.tokens_per_second,
                "speedup_interval": list(speedup_interval(texts[name], texts["plain"])) if alone else None,
                "texts": changed_texts(target, prompts, plain, report) if plain and settings.sampling.greedy else None,
                "resumed": resumed[name],
                "serving": serving[name],
            }
            for name, report in reports.items()
        },
        "difference": difference(*reports.values()) if len(reports) == 2 else None,
    }


def _file_name(name: str) -> str:
    """A drafter's name without what paths are made of."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
