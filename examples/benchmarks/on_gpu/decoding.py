"""Speculation against its limit, other engines, and what compiled and captured forwards would bring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from draft_opd_trl import SpeculationSettings, Target, speculate
from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.decoding.speculation import Lanes, prefill
from draft_opd_trl.drafters import Drafter

from .planted import END, Size, planted_drafter, planted_target, random_prompts, seconds_of


REPEATS = 20


class Round:
    """One round of speculation, in the middle of texts: the target's forward and the drafter's, at fixed shapes."""

    def __init__(self, target: Target, drafter: Drafter, prompts: list[list[int]], new_tokens: int) -> None:
        self.target, self.drafter = target, drafter
        settings = SpeculationSettings(new_tokens, [END])
        length = len(prompts[0])
        self.lanes = Lanes(target, drafter, settings, len(prompts), length)
        index = torch.arange(len(prompts), device=target.device)
        prompts = torch.tensor(prompts, device=target.device)
        prefill(self.lanes, index, prompts, torch.full_like(index, length), index)
        # What would stand between is not written: it costs as much to read.
        anchor = length + new_tokens // 2
        self.anchors = torch.full_like(index, anchor)
        self.limit = anchor + drafter.num_draft_tokens + 1
        self.block = prompts[:, -1:].repeat(1, drafter.num_draft_tokens + 1)
        self.positions = self.anchors[:, None] + torch.arange(drafter.num_draft_tokens + 1, device=target.device)

    @torch.no_grad()
    def verification(self) -> torch.Tensor:
        """The target's logits of a block, read on top of its cache."""
        lanes = self.lanes
        _, states = self.target.forward_cached(self.block, self.positions, lanes.cache, self.limit, lanes.layer_ids)
        return self.target.logits(states)

    @torch.no_grad()
    def drafting(self) -> torch.Tensor:
        """The drafter's proposals, argmax."""
        return self.drafter.propose(
            self.lanes.state, self.block[:, :1], self.anchors[:, None], self.limit, Chooser()
        ).tokens


def generated(target: Target, prompts: list[list[int]], new_tokens: int, **options: Any) -> None:
    """transformers' own greedy decoding."""
    ids = torch.tensor(prompts, device=target.device)
    target.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=END,
        **options,
    )


def measure_decoding(size: Size, device: torch.device) -> Iterator[tuple[str, Any]]:
    """
    Tokens a second by batch, the prefill included. The limit is τ times the target's forwards over a block, as if
    nothing else took time.
    """
    target = planted_target(next(iter(size.targets.values())), device)
    drafter = planted_drafter(size, "dflash", target, target.dtype)
    for batch in size.batches:
        prompts = random_prompts(size, batch, size.prompt_length)
        settings = SpeculationSettings(size.new_tokens, [END], batch_size=batch)
        rollout = speculate(target, drafter, prompts, settings)  # warms up
        committed = int((rollout.completion_lengths - 1).sum())
        tau = committed / len(rollout.blocks)
        tokens = batch * size.new_tokens
        runs = {
            "speculation": lambda p=prompts, s=settings: speculate(target, drafter, p, s),
            "generate": lambda p=prompts: generated(target, p, size.new_tokens),
        }
        if batch == 1:  # it takes one text
            runs["native DFlash"] = lambda p=prompts: generated(
                target, p, size.new_tokens, assistant_model=drafter, speculation_type="dflash"
            )
        found: dict[str, Any] = {"tau": tau}
        for name, run in runs.items():
            run()
            found[name] = tokens / seconds_of(run, device)
        a_round = Round(target, drafter, prompts, size.new_tokens)
        a_round.verification()
        forward, draft = (seconds_of(run, device, REPEATS) for run in (a_round.verification, a_round.drafting))
        limit = tau * batch / forward
        found |= {
            "verification_ms": 1e3 * forward,
            "drafting_ms": 1e3 * draft,
            "limit": limit,
            "speculation_over_limit": found["speculation"] / limit,
            "speculation_over_generate": found["speculation"] / found["generate"],
        }
        yield f"batch {batch}", found


def captured(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], Any], torch.Tensor]:
    """A call as a CUDA graph that repeats it, and the tensor that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


def compiled(run: Callable[[], torch.Tensor], backend: str) -> tuple[Callable[[], Any], torch.Tensor]:
    """A call compiled whole, and what it gives."""
    options = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    function = torch.compile(run, backend=backend, fullgraph=True, dynamic=False, **options)
    for _ in range(3):
        output = function().clone()  # the graph's own memory is written to by its next run
    return function, output


def compare(run: Callable[[], torch.Tensor], size: Size, device: torch.device) -> dict[str, Any]:
    """Milliseconds as it is, compiled and as a CUDA graph, and how far off these are; what did not work says why."""
    expected = run()
    found: dict[str, Any] = {"eager_ms": 1e3 * seconds_of(run, device, REPEATS)}
    ways = {"cuda_graph": lambda: captured(run)} if device.type == "cuda" else {"cuda_graph": None}
    ways["compiled"] = lambda: compiled(run, size.compiler)
    for name, make in ways.items():
        if make is None:
            found[name] = None
            continue
        try:
            again, output = make()
            milliseconds = 1e3 * seconds_of(again, device, REPEATS)
            found[name] = {
                "ms": milliseconds,
                "eager_over": found["eager_ms"] / milliseconds,
                "largest_difference": float((output - expected).abs().max()),
            }
        except Exception as error:  # of a compiler, any; the other ways are still to be tried
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return found


def measure_graphs(size: Size, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Verification and drafting at fixed shapes."""
    target = planted_target(next(iter(size.targets.values())), device)
    drafter = planted_drafter(size, "dflash", target, target.dtype)
    for batch in size.batches[:2]:  # a compiler takes minutes
        a_round = Round(target, drafter, random_prompts(size, batch, size.prompt_length), size.new_tokens)
        for tensor in a_round.lanes.cache.tensors():
            torch._dynamo.mark_static_address(tensor)  # or a graph that writes to it would be refused
        yield f"verification, batch {batch}", compare(a_round.verification, size, device)
        yield f"drafting, batch {batch}", compare(a_round.drafting, size, device)
