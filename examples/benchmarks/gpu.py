"""All that only a GPU can show, by one command: what fits into the time given, the cheapest first.

    python examples/benchmarks/gpu.py --minutes 60 --output_dir outputs/gpu

Each part runs in a process of its own, so that a fault of the device ends that part alone, and writes what it found
after every case. `results.json` holds it all; the same command goes on where it was, and runs again what failed. Ends
by printing one JSON line, in which what was not run is null. Without a GPU it runs too, and tells no peaks and rates.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

# What the package and its tests import beside torch, transformers, accelerate and peft, with what that needs in turn,
# where a machine may lack it; docs/source/benchmarks_gpu.md says how to carry it.
CARRIED = (
    "trl", "datasets", "evaluate", "lazy_loader", "multiprocess", "dill", "xxhash", "pyarrow", "pandas", "rich",
    "matplotlib", "pytest",
)  # fmt: skip
MARGIN = 3  # a part is stopped after so many times its estimate, or when the time is up


@dataclass
class GpuArguments:
    """How much of it."""

    minutes: float = field(default=60.0, metadata={"help": "Time for this call; parts that do not fit are left out."})
    output_dir: str = field(default="outputs/gpu", metadata={"help": "Folder of results.json, and a log a part."})
    parts: list[str] | None = field(default=None, metadata={"help": "Parts to run; all by default."})
    world: str | None = field(
        default=None, metadata={"help": "Folder laid out as examples/pocket, of a model to train a drafter for too."}
    )
    gain: float = field(default=0.03, metadata={"help": "τ to reach, over that of the start."})
    size: str = field(default="full", metadata={"help": "`tiny` tries the command out, on any machine."})
    only: str | None = field(default=None, metadata={"help": "For the command itself: run this part here."})


# Name → seconds it should take on an H100 with the full sizes, guessed before any run, and what runs.
Part = tuple[float, Callable[..., Iterator[tuple[str, Any]]]]


def parts_of(args: GpuArguments) -> dict[str, Part]:
    """All parts, in the order they are run in. Their modules are imported by the process that runs one."""

    def of(module: str, function: str, *arguments: Any) -> Callable[..., Iterator[tuple[str, Any]]]:
        def run(size: Any, device: Any) -> Iterator[tuple[str, Any]]:
            return getattr(importlib.import_module(f"on_gpu.{module}"), function)(size, device, *arguments)

        return run

    parts: dict[str, Part] = {
        "invariants": (90, of("invariants", "measure_invariants")),
        "steps-4B-dflash": (200, of("steps", "measure_steps", "Qwen3-4B", "dflash")),
        "decoding": (180, of("decoding", "measure_decoding")),
        "growth": (120, of("steps", "measure_growth")),
        "pocket": (240, of("world", "measure_world", str(HERE.parent / "pocket"), args.gain)),
        "steps-4B-eagle3": (280, of("steps", "measure_steps", "Qwen3-4B", "eagle3")),
        "steps-8B-dflash": (280, of("steps", "measure_steps", "Qwen3-8B", "dflash")),
        "steps-8B-eagle3": (360, of("steps", "measure_steps", "Qwen3-8B", "eagle3")),
        "graphs": (420, of("decoding", "measure_graphs")),
    }
    if args.world is not None:
        parts["world"] = (900, of("world", "measure_world", args.world, args.gain))
    return parts


def run_here(args: GpuArguments, name: str, limit: float | None = None) -> None:
    """Run a part in this process; what it has found so far is in its file at any time."""
    import torch
    from on_gpu.planted import SIZES

    from draft_opd_trl.core.files import write_atomically

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {"status": "failed", "error": "it was stopped", "result": {}}
    file = part_file(args, name)
    try:
        _, measure = parts_of(args)[name]
        for case, figures in measure(SIZES[args.size], device):
            found["result"][case] = figures
            write_atomically(file, json.dumps(found, indent=2))
        found = {"status": "done", "result": found["result"]}
    except Exception as error:  # whatever it is, the other parts go on
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"[:1000]
    write_atomically(file, json.dumps(found, indent=2))


def run_apart(args: GpuArguments, name: str, limit: float | None = None) -> None:
    """Run a part in a process of its own, for at most `limit` seconds."""
    command = [sys.executable, str(HERE / "gpu.py"), "--only", name, "--size", args.size]
    command += ["--output_dir", args.output_dir, "--gain", str(args.gain)]
    command += ["--world", args.world] if args.world is not None else []
    file = part_file(args, name)
    with file.with_suffix(".log").open("w") as log:
        # Nothing is to be fetched, and no library is to try.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            process.wait(limit)
            reason = f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"it took more than {limit:.0f} s"
        finally:
            if process.poll() is None:  # with what it has started itself
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    found = read(file) or {"status": "failed", "result": {}, "error": ""}
    if found["status"] == "failed" and found["error"] in ("", "it was stopped"):
        from draft_opd_trl.core.files import write_atomically

        found["error"] = f"{reason}; see {file.with_suffix('.log')}"
        write_atomically(file, json.dumps(found, indent=2))


def part_file(args: GpuArguments, name: str) -> Path:
    return Path(args.output_dir) / f"{name}.json"


def read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text()) if file.is_file() else None


def machine(args: GpuArguments) -> dict[str, Any]:
    """What figures belong to: those of another machine, or of other versions, are not put beside them."""
    from importlib.metadata import version

    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {package: version(package) for package in ("torch", "transformers", "accelerate", "peft", "trl")}
    return {"device": name, "size": args.size, "versions": versions}


def line_of(results: dict[str, Any]) -> dict[str, Any]:
    """The last line: figures of the parts that have been run."""
    found = {name: part["result"] for name, part in results["parts"].items()}

    def within(*path: str) -> Any:
        value: Any = found
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def ratio(first: str, second: str) -> float | None:
        one, other = (within("steps-4B-dflash", arm, "ms") for arm in (first, second))
        return one / other if one and other else None

    checks = [said for case in found.get("invariants", {}).values() for said in case.values()]
    sound = all(said == "ok" for said in checks)
    if sound and results["parts"].get("invariants", {}).get("status") != "done":
        sound = None  # not all of them were looked at
    speculation = [case["speculation_over_limit"] for case in found.get("decoding", {}).values()]
    arms = [arm for name, part in found.items() if name.startswith("steps") for arm in part.values()]
    plans = [arm["plan_over_peak"] for arm in arms if arm["plan_over_peak"]]
    return {
        "device": results["machine"]["device"],
        "invariants_ok": sound,
        "mfu": within("steps-4B-dflash", "SFT", "mfu"),
        "opd_over_sft": ratio("Draft-OPD by replay", "SFT"),
        "rollout_over_replay": ratio("Draft-OPD by rollout", "Draft-OPD by replay"),
        "speculation_over_limit": min(speculation, default=None),
        "plan_over_peak": max(plans, key=lambda value: abs(value - 1), default=None),
    }


def refuse_unknown(args: GpuArguments, parts: dict[str, Part], here: dict[str, Any], before: dict | None) -> None:
    """
    Raises:
        `SystemExit`: A part or size that there is not, or results of another machine in the folder.
    """
    unknown = [name for name in args.parts or () if name not in parts]
    if unknown:
        raise SystemExit(f"There are no parts {unknown}; there are {list(parts)}.")
    if args.size not in ("full", "tiny"):
        raise SystemExit(f"size is {args.size!r}; it is `full` or `tiny`.")
    if before is not None and before["machine"] != here:
        raise SystemExit(
            f"{args.output_dir} holds results of {before['machine']}, and this is {here}. Give another --output_dir."
        )


def main(args: GpuArguments, run: Callable[..., None] = run_apart) -> dict[str, Any]:
    """Run what fits and has not been run; returns the last line."""
    if missing := [name for name in CARRIED if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"Missing here: {', '.join(missing)}. docs/source/benchmarks_gpu.md says how to carry them.")
    from draft_opd_trl.core.files import write_atomically

    began, parts, here = time.monotonic(), parts_of(args), machine(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    file = Path(args.output_dir) / "results.json"
    before = read(file)
    refuse_unknown(args, parts, here, before)
    results = before or {"machine": here, "parts": {}}
    for name, (estimate, _) in parts.items():
        known = results["parts"].get(name, {})
        if (args.parts and name not in args.parts) or known.get("status") == "done":
            continue
        left = 60 * args.minutes - (time.monotonic() - began)
        if estimate > left:
            print(f"{name}: left out, as it should take {estimate:.0f} s and {max(left, 0):.0f} are left", flush=True)
            continue
        start = time.monotonic()
        part_file(args, name).unlink(missing_ok=True)
        run(args, name, min(left, MARGIN * estimate))
        results["parts"][name] = {**read(part_file(args, name)), "seconds": time.monotonic() - start}
        write_atomically(file, json.dumps(results, indent=2))
        said = results["parts"][name]
        print(f"{name}: {said['status']} in {said['seconds']:.0f} s {said.get('error', '')}", flush=True)
    line = line_of(results)
    print(json.dumps(line))
    return line


if __name__ == "__main__":
    from transformers import HfArgumentParser

    (arguments,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses()
    if arguments.only is not None:
        run_here(arguments, arguments.only)
    else:
        main(arguments)
