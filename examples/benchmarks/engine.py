"""Losslessness and speed of the speculation loop against transformers in the same run: the pocket world, or any pair.

    python examples/benchmarks/engine.py --prompts 1000 --speed-prompts 64
    python examples/benchmarks/engine.py --target TARGET --drafter DRAFTER --suite prompts.jsonl --batch-sizes 1 8

Greedy, float32. Ends by printing one JSON line. Each speed is the median of `--repeats` runs that take turns, so that
a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import SpeculationSettings, Target, load_drafter, speculate, stop_token_ids  # noqa: E402
from draft_opd_trl.evaluation.suites import load_suite  # noqa: E402
from draft_opd_trl.texts.prompts import tokenize_dataset  # noqa: E402


class Engines:
    """Ways of decoding the same prompts greedily; each returns completions as token ids."""

    def __init__(self, device: str, target: str, drafter: str, max_new_tokens: int) -> None:
        self.device, self.max_new_tokens, self.folder = device, max_new_tokens, target
        self.tokenizer = AutoTokenizer.from_pretrained(target, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device)
        self.target = Target(self.model)
        self.drafter = load_drafter(drafter, dtype="float32").to(device).bind(self.target)
        self.stops = stop_token_ids(self.model, self.tokenizer)

    def ours(self, prompts: list[list[int]], batch_size: int, drafter: bool = True) -> list[list[int]]:
        settings = SpeculationSettings(self.max_new_tokens, self.stops, batch_size=batch_size)
        rollout = speculate(self.target, self.drafter if drafter else None, prompts, settings)
        return rollout.completions()

    def generate(self, prompts: list[list[int]], batch_size: int, **options) -> list[list[int]]:
        completions = []
        for start in range(0, len(prompts), batch_size):
            batch = self.tokenizer.pad({"input_ids": prompts[start : start + batch_size]}, return_tensors="pt")
            batch = batch.to(self.device)
            output = self.model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=self.stops,
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
            for ids in output[:, batch["input_ids"].shape[1] :].tolist():
                end = next((i for i, token in enumerate(ids) if token in self.stops), len(ids) - 1)
                completions.append(ids[: end + 1])
        return completions

    def generate_batch(self, prompts: list[list[int]]) -> list[list[int]]:
        """transformers' continuous batching; it changes the attention of its model, so it gets one of its own."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).to(self.device)
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=self.stops,
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=False,  # it pages its own
        )
        paging = ContinuousBatchingConfig(max_batch_tokens=2048, num_blocks=1024, page_size=32)
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=paging, progress_bar=False
        )
        return [output.generated_tokens for output in outputs.values()]

    def native_dflash(self, prompts: list[list[int]]) -> list[list[int]]:
        """transformers' own DFlash decoding with our drafter; it takes one prompt at a time."""
        return self.generate(prompts, 1, assistant_model=self.drafter, speculation_type="dflash")


def differences(first: list[list[int]], second: list[list[int]]) -> int:
    """Texts that are not the same, token for token."""
    return sum(ours != theirs for ours, theirs in zip(first, second, strict=True))


def token_ids(engines: Engines, suite: str | None, count: int) -> list[list[int]]:
    """Prompts of a suite, or held-out ones of the pocket world."""
    if suite is None:
        return read_prompts(engines.tokenizer, "heldout.jsonl", count)
    return list(tokenize_dataset(load_suite(suite, None, count), engines.tokenizer, None, {})["prompt_ids"])


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engines = Engines(device, args.target, args.drafter, args.max_new_tokens)
    native = engines.drafter.kind == "dflash"
    prompts = token_ids(engines, args.suite, args.prompts)
    largest = max(args.batch_sizes)
    plain = engines.ours(prompts, largest, drafter=False)
    result = {
        "prompts": len(prompts),
        "tokens": sum(map(len, plain)),
        "differs_from_plain_same_engine": differences(engines.ours(prompts, largest), plain),
        "plain_differs_from_generate": differences(plain, engines.generate(prompts, largest)),
        "native_dflash_differs": differences(engines.native_dflash(prompts[:32]), plain[:32]) if native else None,
        "continuous_batching_differs": differences(engines.generate_batch(prompts[:64]), plain[:64]),
    }
    print(json.dumps(result, indent=2))

    runs: dict[str, Callable[[], list[list[int]]]] = {}
    for size in args.batch_sizes:
        few = prompts[: min(args.speed_prompts, 16 * size)]
        runs[f"generate, batch {size}"] = partial(engines.generate, few, size)
        if native and size == 1:
            runs["native dflash, batch 1"] = partial(engines.native_dflash, few)
        runs[f"ours plain, batch {size}"] = partial(engines.ours, few, size, drafter=False)
        runs[f"ours, batch {size}"] = partial(engines.ours, few, size)
        if size == largest > 1:
            runs[f"continuous batching, batch {size}"] = partial(engines.generate_batch, few)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(args.repeats), desc="Timing"):
        for name, run in runs.items():
            start = time.perf_counter()
            tokens = sum(map(len, run()))
            speeds[name].append(tokens / (time.perf_counter() - start))
    print("| engine | tokens/s, median [min, max] | ratio to generate, same batch |\n|---|---|---|")
    for name, values in speeds.items():
        peer = speeds[f"generate, {name.split(', ')[1]}"]
        ratios = [ours / theirs for ours, theirs in zip(values, peer, strict=True)]
        print(
            f"| {name} | {statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}] "
            f"| {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] |"
        )
        result[name] = {"tokens_per_second": statistics.median(values), "over_generate": statistics.median(ratios)}
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(POCKET / "target"))
    parser.add_argument("--drafter", default=str(POCKET / "drafter-dflash"))
    parser.add_argument("--suite", help="Prompts: a suite or a file; the pocket world's where not given.")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--speed-prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
