"""vLLM's own server on a CPU, which makes way for one with another drafter. Usage: STATE DRAFTER.

So it is a `server_reload_command`. STATE is a JSON file: the server's `command` and `url`, how it is to speculate
(`speculation`), and the process that runs, if one does (`pid`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen


STARTS_WITHIN, ENDS_WITHIN, PAUSE = 300, 60, 0.2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def start(file: Path, drafter: Path) -> str:
    """The address of a server with this drafter, once it answers; the one before is stopped first."""
    stop(file)
    state, log = json.loads(file.read_text()), file.with_suffix(".log")
    told = json.dumps({**state["speculation"], "model": str(drafter)})
    with log.open("w") as output:
        server = subprocess.Popen(
            [*state["command"], "--speculative-config", told],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    file.write_text(json.dumps({**state, "pid": server.pid}))
    ends = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < ends:
        if server.poll() is not None:
            break
        with suppress(OSError), urlopen(f"{state['url']}/health", timeout=1):
            return state["url"]
        time.sleep(PAUSE)
    raise RuntimeError(f"No server answers:\n{log.read_text()[-5000:]}")


def stop(file: Path) -> None:
    """End the server that runs, its engine's process with it, and wait until its port is free."""
    state = json.loads(file.read_text())
    group = state.pop("pid", None)
    if group is None:
        return
    file.write_text(json.dumps(state))
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        ends = time.monotonic() + ENDS_WITHIN
        while _listens(state["url"]) and time.monotonic() < ends:
            time.sleep(PAUSE)
        os.killpg(group, signal.SIGKILL)


def _listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((urlsplit(url).hostname, urlsplit(url).port)) == 0


if __name__ == "__main__":
    start(*map(Path, sys.argv[1:]))
