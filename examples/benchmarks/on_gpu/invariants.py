"""
What must hold of every kind of drafter, on the device and in both dtypes: the functions of `tests/invariants.py`. And
what only a GPU can show: that it does what the CPU does, TRL's kernel what the chunks do, and attention is fused.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, measure_acceptance, speculate
from draft_opd_trl.drafters import Drafter
from draft_opd_trl.evaluation.measure import changed_texts
from draft_opd_trl.training.divergences import LossSettings
from draft_opd_trl.training.losses import KERNEL_LOSSES, Heads, slot_losses, uses_kernel

from .planted import Size


TESTS = Path(__file__).resolve().parents[3] / "tests"
OK = "ok"
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
LENGTH = 24


def told(check: Callable[[], Any]) -> str:
    """`OK`, or what a check raised; one that fails says nothing of the next."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return OK


def pair_of(kind: str, device: torch.device, **shape: Any) -> tuple[Target, Drafter]:
    """A tiny target and a drafter that is sometimes right, in float32."""
    import conftest

    target = Target(conftest.tiny_model("qwen3", **shape).to(device))
    prompts = [[3, 1], *conftest.random_prompts(6, vocab_size=target.vocab_size)]
    return target, conftest.train_drafter(target, conftest.tiny_drafter(kind, target), prompts)


def moved(target: Target, drafter: Drafter, *place: Any) -> tuple[Target, Drafter]:
    """Copies in another dtype or on another device."""
    other = Target(copy.deepcopy(target.model).to(*place))
    return other, copy.deepcopy(drafter, {id(target): other}).to(*place).bind(other)


def assert_lossless_to_ties(target: Target, drafter: Drafter, prompts: list[list[int]]) -> None:
    """Texts part only where two tokens share the largest logit to rounding."""
    settings = SpeculationSettings(LENGTH, [], batch_size=3)
    plain, report = (measure_acceptance(target, one, prompts, settings) for one in (None, drafter))
    found = changed_texts(target, prompts, plain, report)
    assert found["changed"] == found["at_ties"], found


def assert_writes_what_the_cpu_does(target: Target, drafter: Drafter, prompts: list[list[int]]) -> None:
    """Texts and blocks."""
    settings = SpeculationSettings(LENGTH, [], batch_size=3)
    import invariants

    there = speculate(target, drafter, prompts, settings)
    here = speculate(*moved(target, drafter, "cpu"), prompts, settings)
    assert there.completions() == here.completions()
    invariants.assert_same_blocks(there.blocks.to("cpu"), here.blocks)


def assert_attention_is_fused(target: Target, drafter: Drafter) -> None:
    """Speculation and a step's gradients, where the plain kernel may not run."""
    import invariants

    with sdpa_kernel(FUSED):
        speculate(target, drafter, [[3, 1], [2]], SpeculationSettings(LENGTH, []))
        invariants.assert_every_parameter_gets_a_gradient(target, copy.deepcopy(drafter, {id(target): target}))


def assert_kernel_is_the_chunks(device: torch.device, dtype: torch.dtype, kind: str, reduced: bool) -> None:
    """Values and gradients of states; a head that is trained is left to the chunks."""
    draws = torch.Generator().manual_seed(0)
    slots, width, vocab = 200, 64, 1000
    vocab_map = torch.arange(0, vocab, 3, device=device) if reduced else None
    states, start = (torch.randn(slots, width, generator=draws).to(device, dtype) for _ in range(2))
    head = (torch.randn(vocab, width, generator=draws) / 8).to(device, dtype)
    own = (torch.randn(vocab if vocab_map is None else len(vocab_map), width, generator=draws) / 8).to(device, dtype)
    tokens = torch.zeros(slots, dtype=torch.long, device=device)
    settings, found = LossSettings(kind, 0.7, beta=0.3), []
    for trained in (True, False):
        weight, hidden = own.clone().requires_grad_(trained), start.clone().requires_grad_()

        def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, weight)

        def target_logits(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, head).float()

        heads = Heads(partial(logits, weight=weight), target_logits, vocab_map, weight, head)
        assert uses_kernel(device, heads, settings) == (device.type == "cuda" and not trained)
        losses, _ = slot_losses(hidden, states, tokens, heads, settings, chunk_size=64)
        losses.sum().backward()
        found.append((losses.detach(), hidden.grad.float()))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


def checks_of(kind: str, device: torch.device) -> Iterator[tuple[str, dict[str, str]]]:
    """By dtype, what became of each check."""
    import conftest
    import invariants

    prompts, law = conftest.random_prompts(7), SamplingParams(1.3)
    pairs = {
        torch.float32: (pair_of(kind, device), pair_of(kind, device, vocab_size=8, seed=3, initializer_range=0.2))
    }
    pairs[torch.bfloat16] = tuple(moved(*pair, torch.bfloat16) for pair in pairs[torch.float32])
    settings = SpeculationSettings(LENGTH, [], batch_size=3)
    for dtype, ((target, drafter), small) in pairs.items():
        checks = {
            "draft is propose": partial(invariants.assert_draft_is_propose, target, drafter),
            "packed scoring": partial(
                invariants.assert_kept_states_are_those_of_packed_scoring, target, drafter, SamplingParams()
            ),
            "law at T = 1.3": partial(invariants.assert_texts_follow_the_targets_law, *small, law, True),
            "lossless to ties": partial(assert_lossless_to_ties, target, drafter, prompts),
            "attention is fused": partial(assert_attention_is_fused, target, drafter),
        }
        if dtype == torch.float32:
            rollout = speculate(target, drafter, prompts, settings)
            checks |= {
                "lossless": partial(invariants.assert_lossless, target, drafter, prompts, settings),
                "replay is speculation": partial(invariants.assert_replay_is_speculation, target, drafter, rollout),
                "law of replay": partial(invariants.assert_replay_has_the_law_of_speculation, *small, law),
                "as on the CPU": partial(assert_writes_what_the_cpu_does, target, drafter, prompts),
            }
        yield f"{kind}, {str(dtype).removeprefix('torch.')}", {name: told(check) for name, check in checks.items()}


def measure_invariants(size: Size, device: torch.device) -> Iterator[tuple[str, Any]]:
    """Every kind in both dtypes, then the kernel."""
    sys.path.insert(0, str(TESTS))
    # What is held to equality in float32 must be float32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for kind in size.kinds:
        yield from checks_of(kind, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield (
            f"kernel, {str(dtype).removeprefix('torch.')}",
            {
                f"{loss}{', draft vocabulary' * reduced}": told(
                    partial(assert_kernel_is_the_chunks, device, dtype, loss, reduced)
                )
                for loss in KERNEL_LOSSES
                for reduced in (False, True)
            },
        )
