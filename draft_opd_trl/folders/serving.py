"""The engines that serve drafters: their versions, which targets were looked up in them, and how they are started.

What a kind of drafter asks of an engine its config says. Knows no models.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from ..drafters import DRAFTERS
from ..drafters.parts import KNOWN_TARGETS


if TYPE_CHECKING:
    from ..drafters.base import Drafter


ENGINES = {"SGLang": "0.5.23", "vLLM": "0.33.0"}


def serves(engine: str, drafter: Drafter, model_type: str) -> bool | None:
    """
    Whether an engine serves targets of this type with such a drafter; `None` where that is not known here.

    Args:
        engine (`str`): Key in `ENGINES`, whose versions this is about.
        drafter ([`Drafter`]): Of any kind.
        model_type (`str`): Of the target's text config.
    """
    served = drafter.config.served_targets.get(engine)
    if served is None or model_type not in KNOWN_TARGETS:
        return None
    return model_type in served


def kinds_served(engine: str, model_type: str) -> list[str]:
    """Kinds of drafters with which an engine serves targets of this type."""
    return [
        kind
        for kind, drafter_class in DRAFTERS.items()
        if model_type in drafter_class.config_class.served_targets.get(engine, ())
    ]


def serving_faults(drafter: Drafter, model_type: str) -> list[tuple[str, str, bool | None]]:
    """What stands between a drafter and each engine, as far as the target's type tells: words, engine, [`serves`]."""
    faults, kind = [], drafter.kind
    for engine, version in ENGINES.items():
        served = serves(engine, drafter, model_type)
        if served is False:
            told = f"{engine} {version} hands no hidden states of a {model_type} target to a {kind} drafter, and stops"
            if others := kinds_served(engine, model_type):
                told += f"; with such a target it serves {', '.join(others)}"
            faults.append((told, engine, served))
        elif served is None:
            told = f"whether {engine} {version} serves a {model_type} target with a {kind} drafter is not known here"
            faults.append((told, engine, served))
    return faults


def launch_commands(drafter: Drafter, target: str, path: str) -> dict[str, str]:
    """
    The shell command that serves `target` with a drafter, for each engine, quoted for a POSIX shell.

    Args:
        drafter ([`Drafter`]): Says what each engine must be told of it.
        target, path (`str`): Ids or paths of the target and of the drafter's folder.
    """
    config, told = drafter.config, (drafter.kind, drafter.num_draft_tokens)
    speculation = shlex.quote(json.dumps({**config.vllm_config(*told), "model": path}))
    target, path = shlex.quote(target), shlex.quote(path)
    algorithm, *lengths = config.sglang_flags(*told)
    sglang = [
        f"python -m sglang.launch_server --model-path {target}",
        algorithm,
        f"--speculative-draft-model-path {path}",
        *([" ".join(lengths)] if lengths else []),
    ]
    return {
        "vLLM": f"vllm serve {target} \\\n    --speculative-config {speculation}",
        "SGLang": " \\\n    ".join(sglang),
    }
