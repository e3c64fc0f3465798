"""The promises of `docs/source/reliability.md`, put to the test: `make soak`.

    python examples/soak/soak.py                          # all of it, within 30 minutes on two cores
    python examples/soak/soak.py --only kills --seed 7    # one part, other instants

Prints what breaks a promise with what shows it again, and at last one line of JSON. Exits with 1 if any was broken.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from typing import Any


# Share of the time each part has; what one leaves, those behind it share.
PARTS = {"texts": 0.15, "inputs": 0.35, "servers": 0.1, "kills": 0.4}
# What a figure must be for the promise to hold.
PROMISES = (
    ("kills_equal", "kills"),
    ("disk_full_equal", "disk_full"),
    ("disk_full_unclear", 0),
    ("unclear", 0),
    ("hangs", 0),
    ("silently_wrong", 0),
    ("texts_changed", 0),
    ("servers_false_alarms", 0),
)


def broken_promises(result: dict[str, Any]) -> list[str]:
    """Which figures are not what was promised."""
    held = ((name, result.get(wanted, 0) if isinstance(wanted, str) else wanted) for name, wanted in PROMISES)
    return [f"{name} is {result[name]}, not {wanted}" for name, wanted in held if result.get(name, wanted) != wanted]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="Bound of the whole; each part gets its share.")
    parser.add_argument("--only", default=",".join(PARTS), help="Parts, separated by commas.")
    parser.add_argument("--seed", type=int, default=0, help="Of everything drawn.")
    parser.add_argument("--scale", type=float, default=1.0, help="Share of the whole amount.")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="Processes at once.")
    options = parser.parse_args(argv)
    names = [name for name in PARTS if name in options.only.split(",")]
    if not names or options.only.split(",") != [name for name in options.only.split(",") if name in PARTS]:
        parser.error(f"--only is {options.only!r}; choose from {', '.join(PARTS)}.")

    from tqdm.auto import tqdm

    tqdm.monitor_interval = 0  # its thread would be lost in forks
    result: dict[str, Any] = dict.fromkeys(("kills", "kills_equal", "inputs", "unclear", "hangs", "silently_wrong"), 0)
    result |= {"texts": 0, "texts_changed": 0}
    start = time.monotonic()
    for place, name in enumerate(names):
        if importlib.util.find_spec(name) is None:
            tqdm.write(f"{name}: there is no {name}.py beside this file, so nothing was tried")
            continue
        left = options.minutes * 60 - (time.monotonic() - start)
        share = left * PARTS[name] / sum(PARTS[later] for later in names[place:])
        own = {} if name == "servers" else {"seed": options.seed, "scale": options.scale, "workers": options.workers}
        found = importlib.import_module(name).run(share, lambda line, name=name: tqdm.write(f"{name}: {line}"), **own)
        if name == "servers":
            found = {key if key == name else f"{name}_{key}": value for key, value in found.items()}
        result |= found
    broken = broken_promises(result)
    for line in broken:
        print(f"NOT AS PROMISED: {line}")
    print(json.dumps({**result, "seconds": round(time.monotonic() - start, 1)}), flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
