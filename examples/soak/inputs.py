"""Bad inputs by the thousand, each in a process of its own, and what becomes of them."""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from bad_answers import answers
from bad_folders import folders
from bad_rows import rows
from bad_settings import combinations, commands, files, options, settings
from forked import HANG as HUNG
from forked import Died, forked
from tqdm.auto import tqdm
from verdicts import CLEAR, HANG, RIGHT, UNCLEAR, WRONG, Input, Verdict, verdict_of
from world import world


INPUTS = 10_000
# Where they come from, and each source's share.
SOURCES = {
    settings: 0.36,
    options: 0.12,
    files: 0.08,
    combinations: 0.16,
    commands: 0.04,
    folders: 0.12,
    rows: 0.08,
    answers: 0.04,
}
# Seconds a process has: for one input, or for a batch of quick ones, which are tried one by one if it runs late.
LIMIT = 10.0
BATCH = 8
MEMORY = 4 * 2**30
FIRST = 20


def _mixed(scratch: str, seed: int, count: int) -> Iterator[Input]:
    """Inputs of all sources, mixed, so that a run that ends early has tried some of each."""
    draws = Random(seed)
    order = [source for source, share in SOURCES.items() for _ in range(max(round(share * count), 1))]
    draws.shuffle(order)
    sources = {source: source(scratch, Random(draws.randrange(2**32))) for source in SOURCES}
    for source in order:
        yield next(sources[source])


def _batches(cases: Iterator[Input]) -> Iterator[list[Input]]:
    """Quick inputs together, every other one alone: a fork costs more than most of the former."""
    quick: list[Input] = []
    for case in cases:
        if not case.quick:
            yield [case]
            continue
        quick.append(case)
        if len(quick) == BATCH:
            yield quick
            quick = []
    if quick:
        yield quick


def _verdicts(batch: list[Input]) -> list[Verdict]:
    return [verdict_of(case) for case in batch]


def _judged(cases: Iterator[Input], until: float, workers: int) -> Iterator[tuple[Input, Verdict]]:
    """Inputs and what became of them."""
    again: list[Input] = []
    for batches in (_batches(cases), ([case] for case in again)):
        for batch, told in forked(_verdicts, batches, until, workers, LIMIT, MEMORY):
            if not isinstance(told, Died):
                yield from zip(batch, told, strict=True)
            elif len(batch) > 1:
                again += batch
            else:
                what = f"no end after {LIMIT:.0f} s" if told == HUNG else str(told)
                yield batch[0], Verdict(HANG if told == HUNG else UNCLEAR, what, what)


def _tell(report: Callable[[str], None], bad: dict[str, list[tuple[Input, Verdict]]]) -> None:
    for kind, found in bad.items():
        groups = Counter((case.kind, verdict.group) for case, verdict in found)
        report(f"{kind}: {len(found)}, of {len(groups)} kinds")
        for (source, group), count in groups.most_common(FIRST):
            report(f"  {count} × {source}: {group}")
        # One of each kind before a second of any.
        seen: Counter = Counter()
        ranked = []
        for case, verdict in found:
            ranked.append((seen[case.kind, verdict.group], len(ranked), case, verdict))
            seen[case.kind, verdict.group] += 1
        for *_, case, verdict in sorted(ranked, key=lambda entry: entry[:2])[:FIRST]:
            report(f"{kind}: {case.shown}\n    → {verdict.what}")


def run(
    seconds: float, report: Callable[[str], None], seed: int = 0, scale: float = 1.0, workers: int = 2
) -> dict[str, Any]:
    """
    Try bad inputs.

    Args:
        seconds, report, seed, scale, workers: As in `kills.run`; `scale` is a share of 10 000 inputs.

    Returns:
        `inputs`, and of these `unclear`, `hangs`, `silently_wrong`, `inputs_right` and `inputs_clear`.
    """
    until = time.monotonic() + seconds
    world()
    count = max(round(INPUTS * scale), len(SOURCES))
    kinds: Counter = Counter()
    bad: dict[str, list[tuple[Input, Verdict]]] = defaultdict(list)
    by_source: dict[str, Counter] = defaultdict(Counter)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as scratch:
        cases = _mixed(scratch, seed, count)
        with tqdm(total=count, desc="inputs", unit="input") as bar:
            for case, verdict in _judged(cases, until, workers):
                kinds[verdict.kind] += 1
                by_source[case.kind][verdict.kind] += 1
                if verdict.kind in (UNCLEAR, HANG, WRONG):
                    bad[verdict.kind].append((case, verdict))
                bar.set_postfix(bad=sum(map(len, bad.values())), refresh=False)
                bar.update()
    for source, found in by_source.items():
        report(f"{source}: {', '.join(f'{number} {kind}' for kind, number in found.most_common())}")
    _tell(report, bad)
    told = {kind: kinds[kind] for kind in (UNCLEAR, HANG, WRONG)}
    return {"inputs": kinds.total(), **told, "inputs_right": kinds[RIGHT], "inputs_clear": kinds[CLEAR]}
