"""Losses under a frozen head: gradients taken at once against checkpointed chunks, in turns.

    python examples/benchmarks/frozen_head.py --dtype bfloat16

Of as many slots as a step of a DFlash drafter for SmolLM2-135M has. Ends by printing one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional

from draft_opd_trl.training.divergences import LossSettings
from draft_opd_trl.training.losses import Heads, slot_losses


@dataclass(frozen=True)
class Chunked(Heads):
    """Heads whose losses are computed as under a head in training."""

    @property
    def separable(self) -> bool:
        return False


def main(args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    weight = (torch.randn(args.vocabulary, args.width) * 0.1).to(dtype)
    states = torch.randn(args.slots, args.width)
    tokens = torch.randint(args.vocabulary, (args.slots,))
    logits = (
        lambda rows: functional.linear(rows.to(dtype), weight),
        lambda rows: functional.linear(rows, weight).float(),
    )

    def seconds(heads: Heads, settings: LossSettings) -> float:
        hidden = states.clone().requires_grad_()
        start = time.perf_counter()
        losses, _ = slot_losses(hidden, states.to(dtype), tokens, heads, settings)
        losses.mean().backward()
        return time.perf_counter() - start

    result, ways = {}, [kind(*logits, None, weight, weight) for kind in (Heads, Chunked)]
    print("| loss | at once, s | checkpointed, s | ratio |\n|---|---|---|---|")
    for name, temperature in (("ce", 0.0), ("forward_kl", 1.0)):
        turns = [[seconds(heads, LossSettings(name, temperature)) for heads in ways] for _ in range(args.repeats + 1)]
        turns = turns[1:]  # the first warms up
        ratios = [chunked / once for once, chunked in turns]
        once, chunked = (statistics.median(column) for column in zip(*turns, strict=True))
        result[name] = statistics.median(ratios)
        spread = f"{result[name]:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| `{name}` | {once:.3f} | {chunked:.3f} | {spread} |")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=896)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    main(parser.parse_args())
