"""Completions servers that are wrong, one after another, and what the server source notices of them.

    python examples/soak/servers.py [--seconds 300] [--texts 512] [--only NAME …]

Each server answers on 127.0.0.1 with text of the pocket target, written or changed in the way its name says. A text
*differs* if the target would not have written it: at temperature 0, if a token's logit is further below the largest
than bf16 kernels explain (3 σ); at temperature 1, if a wrong law wrote it. The share noticed is that of the differing
texts that were not passed on to training, of those written until an alarm ended the run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, speculate, stop_token_ids
from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.seeding import seed_of
from draft_opd_trl.texts.authorship import text_fit
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.server import CompletionsClient, ServerError
from draft_opd_trl.texts.server_source import ServerSource
from draft_opd_trl.texts.sources import DecodingSource


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # the tests' own server

from completions_server import CompletionsServer  # noqa: E402


POCKET = ROOT / "examples" / "pocket"
LENGTH, SET = 128, 64
# Seconds an answer may take, and tries.
TIMEOUT, RETRIES = 2.0, 1
GREEDY, DRAWN = SamplingParams(), SamplingParams(1.0)


class World:
    """The pocket target as it judges (fp32), as it is served (bf16), and prompts."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
        self.model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
        self.target = Target(self.model)
        self.served = Target(AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.bfloat16))
        self.stops = stop_token_ids(self.model, self.tokenizer)
        file = str(POCKET / "prompts" / "quickstart.jsonl")
        rows = tokenize_dataset(load_dataset("json", data_files=file, split="train"), self.tokenizer, None)
        self.prompts: list[list[int]] = [list(ids) for ids in rows["prompt_ids"]]

    def write(self, target: Target, prompts: list[list[int]], sampling: SamplingParams) -> list[list[int]]:
        settings = SpeculationSettings(LENGTH, self.stops, sampling, batch_size=32)
        generator = torch.Generator().manual_seed(seed_of(prompts))
        return speculate(target, None, prompts, settings, generator).completions()

    def noised(self, size: float) -> Target:
        """The served target with each weight off by `size` of its tensor's standard deviation."""
        model = deepcopy(self.served.model)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator) * weight.float().std()
            weight.data += (size * noise).to(weight.dtype)
        return Target(model)

    def without_last_layer(self) -> Target:
        """Another model that writes the same language."""
        model = deepcopy(self.served.model)
        model.model.layers = model.model.layers[:-1]
        model.config.num_hidden_layers -= 1
        return Target(model)


@dataclass
class Fault:
    """
    A server.

    Args:
        write (`Callable`): `(world, prompts, how many texts came before) -> completions`.
        sampling (`SamplingParams`): What it is asked for.
        right (`bool`): Nothing is wrong, and any alarm is a false one.
        after (`int`): Texts that are right before it turns.
        options (`dict`): Of [`CompletionsServer`].
    """

    write: Callable[[World, list[list[int]], int], list[list[int]]]
    sampling: SamplingParams = GREEDY
    right: bool = False
    after: int = 0
    options: dict = field(default_factory=dict)


def _drawn(asked: SamplingParams, served: SamplingParams, right: bool = False) -> Fault:
    return Fault(lambda world, prompts, before: world.write(world.served, prompts, served), asked, right)


def _model(build: Callable[[World], Target], asked: SamplingParams = GREEDY) -> Fault:
    built: list[Target] = []

    def write(world: World, prompts: list[list[int]], before: int) -> list[list[int]]:
        built.extend([] if built else [build(world)])
        return world.write(built[0], prompts, asked)

    return Fault(write, asked)


def _turning(after: int, asked: SamplingParams, served: SamplingParams) -> Fault:
    """As asked for `after` texts, then otherwise."""

    def write(world: World, prompts: list[list[int]], before: int) -> list[list[int]]:
        return world.write(world.served, prompts, asked if before < after else served)

    return Fault(write, asked, after=after)


def _changed(change: Callable[[list[int]], list[int]], **options) -> Fault:
    def write(world: World, prompts: list[list[int]], before: int) -> list[list[int]]:
        return [change(text) for text in world.write(world.served, prompts, GREEDY)]

    return Fault(write, options=options)


def _hostile(fault: str | bytes | dict) -> Fault:
    """Every answer is of this kind, and never a text."""
    return Fault(lambda world, prompts, before: [[]] * len(prompts), options={"faults": [fault] * 10_000})


LAWS = {
    "right, greedy": _drawn(GREEDY, GREEDY, right=True),
    "right, T = 1": _drawn(DRAWN, DRAWN, right=True),
    "right, T = 0.7, top-k, top-p": _drawn(SamplingParams(0.7, 20, 0.9), SamplingParams(0.7, 20, 0.9), right=True),
    "T = 0.1 for greedy": _drawn(GREEDY, SamplingParams(0.1)),
    "T = 0.2 for greedy": _drawn(GREEDY, SamplingParams(0.2)),
    "T = 0.3 for greedy": _drawn(GREEDY, SamplingParams(0.3)),
    "T = 1 for greedy": _drawn(GREEDY, DRAWN),
    "T = 0.9 for 1": _drawn(DRAWN, SamplingParams(0.9)),
    "T = 1.1 for 1": _drawn(DRAWN, SamplingParams(1.1)),
    "greedy for T = 1": _drawn(DRAWN, GREEDY),
    "noised 0.3 %": _model(lambda world: world.noised(0.003)),
    "noised 1 %": _model(lambda world: world.noised(0.01)),
    "noised 3 %": _model(lambda world: world.noised(0.03)),
    "noised 10 %": _model(lambda world: world.noised(0.1)),
    "noised 10 %, T = 1": _model(lambda world: world.noised(0.1), DRAWN),
    "other model": _model(World.without_last_layer),
    "other model, T = 1": _model(World.without_last_layer, DRAWN),
    "other template": Fault(
        lambda world, prompts, before: world.write(world.served, [p[3:] for p in prompts], GREEDY)
    ),
    "T = 0.3 after 64": _turning(64, GREEDY, SamplingParams(0.3)),
    "T = 1.1 after 64": _turning(64, DRAWN, SamplingParams(1.1)),
    "T = 0.3 after 1024": _turning(1024, GREEDY, SamplingParams(0.3)),
    "cut short": _changed(lambda ids: ids[: len(ids) // 2]),
    "longer than asked": _changed(lambda ids: ids + ids, too_long=True),
    "ids outside the vocabulary": _changed(lambda ids: [*ids[:-1], 10**6]),
    "negative ids": _changed(lambda ids: [-1, *ids[1:]]),
}
HOSTILE = {
    "a byte now and then": _hostile("drip"),
    "an answer without end": _hostile("huge"),
    "a packed answer": _hostile("packed"),
    "Retry-After of an hour": _hostile({"Retry-After": "3600"}),
    "a redirect": _hostile({"Location": "http://user:secret@127.0.0.2/v1/completions"}),
    "no JSON": _hostile(b"<html>"),
    "nested JSON": _hostile(b"[" * 50_000),
    "no choices": _hostile(b'{"choices": []}'),
    "a text that is a number": _hostile(b'{"choices": [{"text": 5}]}'),
    "dying": _hostile("cut"),
}


def _differing(
    world: World, fault: Fault, prompts: list[list[int]], served: list[list[int]], before: int
) -> list[bool]:
    """Which texts the target would not have written."""
    if fault.right or before < fault.after:
        return [False] * len(served)
    if not fault.sampling.greedy or not served[0]:
        return [True] * len(served)
    # Ids that the target cannot read differ as they are.
    read = [[min(max(token, 0), world.target.vocab_size - 1) for token in text[:LENGTH]] for text in served]
    fit = text_fit(world.target, Rollout.from_ids(prompts, read), GREEDY)
    ended = [len(text) == LENGTH or text[-1] in world.stops for text in read]
    return [
        other or not end or text != seen
        for other, end, text, seen in zip((fit.num_greedy < fit.num_tokens).tolist(), ended, served, read, strict=True)
    ]


def serve(world: World, fault: Fault, texts: int, deadline: float) -> dict:
    """One server, until it is noticed, all texts are written, or time is up."""
    table: dict[tuple[int, ...], list[int]] = {}
    seen = {"texts": 0, "dropped": 0, "differing": 0, "passed": 0, "alarm": None, "error": None}

    def answer(prompt: list[int]) -> tuple[list[int], bool]:
        text = table.get(tuple(prompt)) or [world.stops[0]]
        return text, text[-1] in world.stops

    with CompletionsServer(answer, world.tokenizer, **fault.options) as server:
        settings = SpeculationSettings(LENGTH, world.stops, fault.sampling)
        client = CompletionsClient(
            server.url, fault.sampling, LENGTH, world.stops, lambda ids: None, timeout=TIMEOUT, max_retries=RETRIES
        )
        source = ServerSource(
            client,
            world.tokenizer,
            DecodingSource(world.target, None, settings, 0),
            lambda *kept: None,
            lambda *_: None,
        )
        for before in range(0, min(texts, len(world.prompts)), SET):
            prompts = world.prompts[before : before + SET]
            served = fault.write(world, prompts, before)
            table.update({tuple(prompt): text for prompt, text in zip(prompts, served, strict=True)})
            differing = _differing(world, fault, prompts, served, before)
            seen["texts"] += len(prompts)
            seen["differing"] += sum(differing)
            try:
                got = source.write([{"prompt_ids": prompt} for prompt in prompts]).completions()
            except ServerError as error:
                seen["alarm"], seen["error"] = source.num_judged, str(error)
                break
            finally:
                seen["dropped"] = source.faults.total()
            seen["passed"] += sum(
                text == own for text, own, differs in zip(served, got, differing, strict=True) if differs
            )
            if time.monotonic() > deadline:
                break
    return seen


def run(
    seconds: float, report: Callable[[str], None], texts: int = 512, only: list[str] | None = None
) -> dict[str, object]:
    """
    Serve each fault, and count what is noticed.

    Args:
        seconds (`float`): About as long as all of it may take.
        report (`Callable`): Takes lines of progress.
        texts (`int`, *optional*, defaults to `512`): Texts of a server.
        only (`list[str]`, *optional*): Names of faults; all by default.

    Returns:
        `dict`: `servers`, `noticed` (servers whose differing texts were noticed, all or so many that the run ended),
        `shares` (of the differing texts, by fault), `false_alarms` and `dropped_of_right` (texts of right servers that
        raised an alarm or were dropped).
    """
    world, ends = World(), time.monotonic() + seconds
    faults = {name: fault for name, fault in {**HOSTILE, **LAWS}.items() if not only or name in only}
    found = {"servers": 0, "noticed": 0, "shares": {}, "false_alarms": 0, "right_texts": 0, "dropped_of_right": 0}
    for number, (name, fault) in enumerate(faults.items()):
        now = time.monotonic()
        if now > ends:
            report(f"time is up: {len(faults) - number} servers were not started")
            break
        seen = serve(world, fault, texts, now + (ends - now) / (len(faults) - number))
        took = time.monotonic() - now
        if fault.right:
            found["false_alarms"] += seen["alarm"] is not None
            found["right_texts"] += seen["texts"]
            found["dropped_of_right"] += seen["dropped"]
            report(f"{name}: {seen['texts']} texts, {seen['dropped']} dropped, alarm {seen['alarm']} ({took:.0f} s)")
            continue
        found["servers"] += 1
        share = 1 - seen["passed"] / seen["differing"] if seen["differing"] else None
        found["shares"][name] = share
        found["noticed"] += seen["alarm"] is not None or seen["dropped"] > 0
        report(
            f"{name}: {seen['differing']} of {seen['texts']} differ, {seen['passed']} passed on, share noticed "
            f"{'-' if share is None else f'{share:.3f}'}; alarm after {seen['alarm']} texts, {seen['dropped']} "
            f"dropped ({took:.0f} s)"
        )
        if seen["error"]:
            report(f"    {seen['error'][:240]}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    print(run(options.seconds, lambda line: print(line, flush=True), options.texts, options.only))
