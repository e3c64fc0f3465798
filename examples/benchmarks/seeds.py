"""Mean, spread and paired difference over several quickstarts.

    for seed in 0 1 2; do python examples/quickstart.py --seed $seed --output_dir outputs/seed-$seed; done
    python examples/benchmarks/seeds.py outputs/seed-*/results.json

Ends by printing one JSON line.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


ROWS = ("tau_start", "tau_sft", "tau_sft_equal_time", "tau_opd")
PAIRS = {
    "equal steps": ("tau_opd", "tau_sft"),
    "equal wall time": ("tau_opd", "tau_sft_equal_time"),
    "SFT's own gain, equal steps": ("tau_sft", "tau_start"),
}


def spread(values: list[float]) -> str:
    """Mean and, from two values on, their standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main(files: list[str]) -> None:
    if not files:
        raise SystemExit("Give the results.json files of several quickstarts.")
    results = [json.loads(Path(file).read_text()) for file in files]
    seeds = [result["seed"] for result in results]
    print(f"| | mean ± s.d. over seeds {', '.join(map(str, seeds))} | each |\n|---|---|---|")
    for row in ROWS:
        values = [result[row] for result in results]
        print(f"| {row} | {spread(values)} | {', '.join(f'{value:.3f}' for value in values)} |")
    summary = {"seeds": seeds, "seconds": [result["seconds"]["total"] for result in results]}
    for label, (first, second) in PAIRS.items():
        values = [result[first] - result[second] for result in results]
        print(f"| {first} − {second} ({label}) | {spread(values)} | {', '.join(f'{v:+.3f}' for v in values)} |")
        summary[f"{first}-{second}"] = values
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
