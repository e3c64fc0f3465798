"""What a training step costs: SFT, Draft-OPD by replay, and Draft-OPD with a real rollout each step, in turns.

    OMP_NUM_THREADS=1 python examples/benchmarks/step.py --drafter dflash
    python examples/benchmarks/step.py --target TARGET --drafter DRAFTER --suite prompts.jsonl --dtype bfloat16

Same texts, same number of blocks, same optimizer. Ratios are taken within a round, so that a machine that slows down
slows all of them. Ends by printing one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    DraftOPDConfig,
    DraftOPDTrainer,
    MuonWithAdamW,
    SpeculationSettings,
    Target,
    load_drafter,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.records import Rollout  # noqa: E402
from draft_opd_trl.core.stopwatch import Stopwatch  # noqa: E402
from draft_opd_trl.decoding import replay as replay_module  # noqa: E402
from draft_opd_trl.drafters import Drafter  # noqa: E402
from draft_opd_trl.evaluation.suites import load_suite  # noqa: E402
from draft_opd_trl.texts.prompts import tokenize_dataset  # noqa: E402


ARMS = {
    "SFT": {"lmbda": 0.0, "rollout_source": "dataset"},
    "Draft-OPD by replay": {"lmbda": 1.0, "rollout_source": "dataset"},
    "Draft-OPD by replay, rejected stream": {"lmbda": 1.0, "rollout_source": "dataset", "rejected_weight": 0.1},
    "Draft-OPD by rollout": {"lmbda": 1.0, "rollout_source": "speculation"},
    "SFT, states kept": {"lmbda": 0.0, "rollout_source": "dataset", "state_store_gib": 2.0},
    "Draft-OPD by replay, states kept": {"lmbda": 1.0, "rollout_source": "dataset", "state_store_gib": 2.0},
}
CHAINS = (1, 8, 32, 128)
PARTS = ("rollout", "target_text", "replay", "scoring", "drafter_forward", "head", "backward", "optimizer")


class Arm:
    """
    One way of training, a step at a time.

    Args:
        config ([`DraftOPDConfig`]): What is special about it.
        drafter ([`Drafter`]): Trained.
        model, tokenizer, dataset: The target, its tokenizer, and texts.
    """

    def __init__(self, config: DraftOPDConfig, drafter: Drafter, model, tokenizer, dataset: Dataset) -> None:
        self.optimizer = MuonWithAdamW(drafter.parameters(), lr=4e-4)
        self.trainer = DraftOPDTrainer(
            drafter,
            model,
            config,
            train_dataset=dataset,
            processing_class=tokenizer,
            optimizers=(self.optimizer, None),
        )
        self.rows = self._rows()
        self.watch = Stopwatch(self.trainer.accelerator.device)
        self._keep_states(dataset)
        self.forget()
        # The forward pass, split into the drafter's and the losses'.
        drafter.draft = self.watch.timed("drafter_forward", drafter.draft)

    def forget(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.blocks: list[float] = []

    def _keep_states(self, dataset: Dataset) -> None:
        """A step is timed as it is from the second epoch on."""
        store = self.trainer.feed.batch_maker.store
        for row in dataset if store else ():
            text = torch.tensor([row["prompt_ids"] + row["completion_ids"]], device=self.trainer.target.device)
            store.read(text, torch.tensor([text.shape[1]]))

    def _rows(self) -> Iterator[list[dict]]:
        while True:
            yield from self.trainer.get_train_dataloader()

    def step(self) -> float:
        """One optimizer step; returns its seconds."""
        trainer, rows = self.trainer, next(self.rows)
        with self.watch.measure("whole"):
            trainer.training_step(trainer.model, rows)
            with self.watch.measure("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        trainer.state.global_step += 1
        figures, seconds = trainer.window_figures(), self.watch.read()
        for name, value in {**figures, **seconds}.items():
            self.seconds[name.removeprefix("time/")] += value
        self.blocks.append(figures["replay/blocks"])
        return seconds["whole"]

    def parts(self, steps: int) -> dict[str, float]:
        """Mean milliseconds a step in each part."""
        spent = dict(self.seconds, head=self.seconds["forward"] - self.seconds["drafter_forward"])
        return {name: 1e3 * spent.get(name, 0.0) / steps for name in PARTS}


def shipped_arm(options: dict, args: argparse.Namespace, model, tokenizer, dataset: Dataset, folder: str) -> Arm:
    """An arm whose drafter is a folder's, or a shipped one."""
    config = DraftOPDConfig(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        num_anchors=args.num_anchors,
        max_completion_length=args.max_new_tokens,
        report_to="none",
        # For what is trained on; the target was loaded in it.
        bf16=args.dtype == "bfloat16",
        num_texts_to_check=0,
        **options,
    )
    return Arm(config, load_drafter(drafter_path(args.drafter), dtype="float32"), model, tokenizer, dataset)


def chains_table(drafter, target: Target, texts: list[list[int]], lengths: list[int], repeats: int) -> bool:
    """
    Print replay's speed by number of chains on long texts, over one chain, and the sequential rounds it took; returns
    whether every number of chains gave the same blocks. That is asked in float64: in float32 one slot of some hundred
    thousand has two tokens whose logits are equal to rounding, and the shape of a batch decides between them.
    """
    exact = Target(copy.deepcopy(target.model).double())
    exact_drafter = copy.deepcopy(drafter, {id(target): exact}).double().bind(exact)
    drafted_at, rounds = replay_module.draft_at, 0

    def count_rounds(*arguments):
        nonlocal rounds
        rounds += 1
        return drafted_at(*arguments)

    replay_module.draft_at = count_rounds
    written = torch.tensor([token for text in texts for token in text], device=target.device)
    equal = True
    print("| tokens | texts | blocks | rounds, 1 chain |" + "".join(f" {n} chains | rounds |" for n in CHAINS[1:]))
    print("|---|---|---|---|" + "---|---|" * (len(CHAINS) - 1))
    for length in lengths:
        # No text of the pocket world is that long: they are laid end to end.
        count = min(4, len(written) // length)
        rollout = Rollout(
            written[: count * length].reshape(count, length),
            written.new_ones(count),
            written.new_full((count,), length),
        )
        features, _ = target.forward_text(rollout.tokens, drafter.target_layer_ids)
        seconds: dict[int, list[float]] = defaultdict(list)
        depth = {}
        for _ in range(repeats):
            for chains in CHAINS:
                rounds, start = 0, time.perf_counter()
                blocks = replay_module.replay_text(drafter, rollout, features, chains)
                depth[chains] = rounds
                seconds[chains].append(time.perf_counter() - start)
        features, _ = exact.forward_text(rollout.tokens, drafter.target_layer_ids)
        found = {chains: replay_module.replay_text(exact_drafter, rollout, features, chains) for chains in CHAINS}
        for other in found.values():
            equal &= all(torch.equal(getattr(found[1], name), getattr(other, name)) for name in vars(other))
        cells = [f" {_ratio(seconds[1], seconds[chains])} | {depth[chains]} |" for chains in CHAINS[1:]]
        print(f"| {length} | {count} | {len(blocks)} | {depth[1]} |" + "".join(cells))
    replay_module.draft_at = drafted_at
    return equal


def _ratio(first: list[float], second: list[float]) -> str:
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def drafter_path(name: str) -> str:
    """A folder, or that of a shipped drafter."""
    return name if Path(name).is_dir() else str(POCKET / f"drafter-{name}")


def peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=getattr(torch, args.dtype)).to(device)
    target = Target(model)
    if args.suite is None:
        prompts = read_prompts(tokenizer, "quickstart.jsonl", args.texts)
    else:
        prompts = list(tokenize_dataset(load_suite(args.suite, None, args.texts), tokenizer, None, {})["prompt_ids"])
    settings = SpeculationSettings(args.max_new_tokens, stop_token_ids(model, tokenizer), batch_size=64)
    completions = speculate(target, None, prompts, settings).completions()
    dataset = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions})
    rounds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        arms = {name: shipped_arm(ARMS[name], args, model, tokenizer, dataset, folder) for name in args.arms}
        for arm in arms.values():
            arm.step()
            arm.forget()
        for _ in tqdm(range(args.rounds), desc="Rounds"):
            for name, arm in arms.items():
                rounds[name].append(sum(arm.step() for _ in range(args.steps)) / args.steps)
    print("| arm | ms a step, median [min, max] | over SFT | blocks a step | " + " | ".join(PARTS) + " |")
    print("|---|---|---|---|" + "---|" * len(PARTS))
    for name, arm in arms.items():
        values = [1e3 * seconds for seconds in rounds[name]]
        parts = arm.parts(args.rounds * args.steps)
        print(
            f"| {name} | {statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}] "
            f"| {_ratio(rounds[name], rounds['SFT'])} | {statistics.mean(arm.blocks):.0f} | "
            + " | ".join(f"{value:.0f}" for value in parts.values())
            + " |"
        )
    equal = None
    if args.lengths:
        drafter = load_drafter(drafter_path(args.drafter), dtype="float32").to(device).bind(target)
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        equal = chains_table(drafter, target, texts, args.lengths, args.repeats)

    def over(arm: str, other: str) -> float | None:
        pairs = zip(rounds.get(arm, ()), rounds.get(other, ()), strict=True)
        return statistics.median(ratios) if (ratios := [one / two for one, two in pairs]) else None

    result = {
        "opd_step_over_sft_step": over("Draft-OPD by replay", "SFT"),
        "opd_step_over_sft_step_states_kept": over("Draft-OPD by replay, states kept", "SFT, states kept"),
        "sft_step_states_kept_over_sft_step": over("SFT, states kept", "SFT"),
        "rollout_over_replay_step": over("Draft-OPD by rollout", "Draft-OPD by replay"),
        "peak_memory_mb": peak_memory_mb(),
        "stitched_equal": equal,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(POCKET / "target"))
    parser.add_argument("--drafter", default="dflash", help="a folder, or a shipped one of the pocket world's")
    parser.add_argument("--suite", help="prompts: a suite or a file; the pocket world's where not given")
    parser.add_argument("--dtype", default="float32", help="of the target; bfloat16 trains the drafter under autocast")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--texts", type=int, default=256, help="texts to train on")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-anchors", type=int, default=32, help="most blocks a text, in every arm")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of each arm a round")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3, help="of each replay of long texts")
    main(parser.parse_args())
