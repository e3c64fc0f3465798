"""Scaling efficiency on the CPU: step time of 1, 2 and 4 processes with the same work a process, on the pocket world.

    python examples/benchmarks/ranks.py --repeats 3

Turns are interleaved. Needs as many idle cores as the largest number of processes; the load before each turn is part
of the result. Ends by printing one JSON line: seconds a step (median of each turn) and efficiency (seconds of one
process over those of n, by medians over turns).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


EXAMPLES = Path(__file__).resolve().parents[1]
POCKET = EXAMPLES / "pocket"


@dataclass
class RanksArguments:
    """How much of it."""

    ranks: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "Numbers of processes."})
    repeats: int = field(default=3, metadata={"help": "Turns of each."})
    steps: int = field(default=12, metadata={"help": "Steps a turn; the first two are not counted."})
    batch_size: int = field(default=4, metadata={"help": "Texts a process and step."})


def step_seconds(args: RanksArguments, ranks: int) -> float:
    """Median seconds of a step of greedy Draft-OPD with rollouts in process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(EXAMPLES / "train.py"), "--ddp_backend", "gloo", "--use_cpu", "--num_eval_prompts", "0"]
        command += ["--model_name_or_path", str(POCKET / "drafter-dflash"), "--num_anchors", "32"]
        command += ["--teacher_model_name_or_path", str(POCKET / "target"), "--output_dir", folder]
        command += ["--dataset_name", str(POCKET / "prompts" / "quickstart.jsonl"), "--max_steps", str(args.steps)]
        command += ["--per_device_train_batch_size", str(args.batch_size), "--max_completion_length", "128"]
        command += ["--teacher_model_init_kwargs", '{"dtype": "float32"}', "--report_to", "none"]
        command += ["--logging_steps", "1", "--save_steps", str(args.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        state = json.loads((Path(folder) / f"checkpoint-{args.steps}" / "trainer_state.json").read_text())
    return statistics.median([log["step_time"] for log in state["log_history"] if "step_time" in log][2:])


def main(args: RanksArguments) -> None:
    turns = []
    for _ in range(args.repeats):
        for ranks in args.ranks:
            load = os.getloadavg()[0]
            turns.append({"ranks": ranks, "load": load, "seconds": step_seconds(args, ranks)})
            print(turns[-1], flush=True)
    seconds = {n: statistics.median(turn["seconds"] for turn in turns if turn["ranks"] == n) for n in args.ranks}
    efficiency = {n: seconds[args.ranks[0]] / value for n, value in seconds.items()}
    print(json.dumps({"turns": turns, "seconds": seconds, "efficiency": efficiency, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main(*HfArgumentParser(RanksArguments).parse_args_into_dataclasses())
