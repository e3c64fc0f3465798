"""What speculation over a recurrent target costs: its states kept, its texts read anew, and its own `generate`.

    python examples/benchmarks/recurrent.py

A pocket-shaped Qwen3-Next at random, and proposals that are right for as long as a drafter of the pocket world's are:
what is timed is the target's side. Greedy, float32. The three take turns; ends with a table and one JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, logging

from draft_opd_trl import SpeculationSettings, Target, speculate
from draft_opd_trl.drafters import Proposal


VOCAB = 1024
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 576,
    "moe_intermediate_size": 144,
    "shared_expert_intermediate_size": 144,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 48,
    "linear_value_head_dim": 48,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


@dataclass
class RecurrentArguments:
    """What is timed."""

    lengths: list[int] = field(default_factory=lambda: [64, 256, 1024], metadata={"help": "Tokens of a prompt."})
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Texts side by side."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens of a completion."})
    block_size: int = field(default=8, metadata={"help": "Proposals, and one."})
    right: float = field(default=0.82, metadata={"help": "How often a proposal is right, if those before it are."})
    repeats: int = field(default=3, metadata={"help": "Turns."})


class Oracle:
    """
    Proposes a text's own tokens, each with a wrong one in its place from the first of them that is drawn so.

    Args:
        texts (`dict`): A prompt's tokens → its whole text.
        num_draft_tokens (`int`): K.
        right (`float`): Probability of a right proposal.
    """

    target_layer_ids = (1,)

    def __init__(self, texts: dict[tuple[int, ...], list[int]], num_draft_tokens: int, right: float) -> None:
        self.texts, self.num_draft_tokens, self.right = texts, num_draft_tokens, right
        self.draws = torch.Generator().manual_seed(0)

    def start(self, batch_size: int, max_length: int) -> torch.Tensor:
        return torch.zeros((batch_size, max_length + self.num_draft_tokens), dtype=torch.long)

    def extend(
        self,
        state: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        lanes: torch.Tensor | None = None,
    ) -> None:
        for lane, prompt in zip(
            [] if lanes is None else lanes.tolist(), tokens[:, : positions.shape[1]], strict=False
        ):
            text = self.texts[tuple(prompt.tolist())]
            state[lane, : len(text)] = torch.tensor(text)

    def propose(self, state: torch.Tensor, tokens: torch.Tensor, anchors: torch.Tensor, *_: Any) -> Proposal:
        places = anchors + torch.arange(1, self.num_draft_tokens + 1)
        right = torch.rand(places.shape, generator=self.draws) < self.right
        proposed = (state.gather(1, places) + ~right) % VOCAB
        return Proposal(proposed[:, None])


def main(args: RecurrentArguments) -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_next", **SHAPE)).float()
    targets = {"kept": Target(model), "read anew": Target(model)}
    targets["read anew"].reads_anew = "the benchmark says so"
    rows = [(length, batch) for length in args.lengths for batch in args.batch_sizes]
    found = []
    for length, batch in tqdm(rows):
        settings = SpeculationSettings(args.new_tokens, [], batch_size=batch)
        prompts = torch.randint(1, VOCAB, (batch, length)).tolist()
        plain = speculate(targets["kept"], None, prompts, settings)
        texts = {tuple(prompt): text for prompt, text in zip(prompts, plain.tokens.tolist(), strict=True)}
        seconds: dict[str, list[float]] = {"generate": [], "kept": [], "read anew": []}
        for _ in range(args.repeats):
            for way, taken in seconds.items():
                oracle = None if way == "generate" else Oracle(texts, args.block_size - 1, args.right)
                began = time.perf_counter()
                rollout = speculate(targets.get(way, targets["kept"]), oracle, prompts, settings)
                taken.append(time.perf_counter() - began)
                if not torch.equal(rollout.tokens, plain.tokens):
                    raise AssertionError(f"{way} wrote another text at length {length}, batch {batch}")
                if oracle is not None:
                    tau = batch * (args.new_tokens - 1) / len(rollout.blocks)
        found.append(
            {"length": length, "batch": batch, "tau": round(tau, 2), **_ratios(seconds, args.new_tokens * batch)}
        )
    print(_table(found))
    print(json.dumps(found))


def _ratios(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    """Tokens a second, and how they compare turn by turn: median, least, greatest."""

    def spread(values: list[float]) -> list[float]:
        return [round(value, 2) for value in (statistics.median(values), min(values), max(values))]

    def over(first: str, second: str) -> list[float]:
        return spread([theirs / ours for ours, theirs in zip(seconds[first], seconds[second], strict=True)])

    speeds = {way: round(statistics.median(tokens / taken for taken in values)) for way, values in seconds.items()}
    return {
        "tokens/s": speeds,
        "kept / read anew": over("kept", "read anew"),
        "kept / generate": over("kept", "generate"),
        "read anew / generate": over("read anew", "generate"),
    }


def _table(found: list[dict[str, Any]]) -> str:
    ratios = ("kept / read anew", "kept / generate", "read anew / generate")
    ways = ("kept", "read anew", "generate")
    lines = [f"| prompt | batch | τ | {' | '.join(ratios)} | tokens/s: {', '.join(ways)} |", "|---" * 7 + "|"]
    for row in found:
        cells = [f"{middle} [{least}, {most}]" for middle, least, most in (row[ratio] for ratio in ratios)]
        speeds = ", ".join(str(row["tokens/s"][way]) for way in ways)
        lines.append(f"| {row['length']} | {row['batch']} | {row['tau']} | {' | '.join(cells)} | {speeds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*HfArgumentParser(RecurrentArguments).parse_args_into_dataclasses())
