"""Which targets the engines serve with a drafter, and how they are started. Knows no models."""

from __future__ import annotations

import json
import shlex


# What was read: SGLang's `set_dflash_layers_to_capture` and `set_eagle3_layers_to_capture`, and vLLM's interface
# `SupportsEagle3`, through which both kinds get their hidden states there. A model class without it refuses to start.
ENGINES = {"SGLang": "0.5.23", "vLLM": "0.33.0"}
_BOTH, _EAGLE3, _NONE = ("dflash", "eagle3"), ("eagle3",), ()
# `model_type` of a target's text config → the kinds that SGLang serves it with, and those that vLLM does.
_SERVED = {
    "apertus": (_EAGLE3, _BOTH),
    "cohere2": (_NONE, _NONE),
    "deepseek_v3": (_BOTH, _BOTH),
    "gemma": (_NONE, _NONE),
    "gemma2": (_NONE, _NONE),
    # SGLang lends EAGLE-3 the embedding's raw rows, without Gemma's scale, and EAGLE-3 is drafted with those here too.
    "gemma3_text": (_EAGLE3, _NONE),
    "glm4": (_NONE, _NONE),
    "glm4_moe": (_EAGLE3, _NONE),
    "gpt_oss": (_BOTH, _BOTH),
    "granite": (_NONE, _BOTH),
    "llama": (_BOTH, _BOTH),
    "ministral3": (_BOTH, _BOTH),
    "mistral": (_BOTH, _BOTH),
    "mixtral": (_NONE, _NONE),
    "phi3": (_BOTH, _BOTH),
    "qwen2": (_EAGLE3, _BOTH),
    "qwen2_moe": (_EAGLE3, _NONE),
    "qwen3": (_BOTH, _BOTH),
    "qwen3_moe": (_BOTH, _BOTH),
}
# What SGLang also needs to be told; vLLM reads the rest from the folder.
_SGLANG_LENGTHS = {
    "eagle3": "--speculative-num-steps {k} --speculative-eagle-topk 1 --speculative-num-draft-tokens {block}"
}


def serves(engine: str, kind: str, model_type: str) -> bool | None:
    """
    Whether an engine serves targets of this type with drafters of this kind; `None` where that is not known here.

    Args:
        engine (`str`): Key in `ENGINES`, whose versions this is about.
        kind (`str`): Key in `DRAFTERS`.
        model_type (`str`): Of the target's text config.
    """
    if model_type not in _SERVED:
        return None
    return kind in _SERVED[model_type][list(ENGINES).index(engine)]


def serving_faults(kind: str, model_type: str) -> list[tuple[str, str, bool | None]]:
    """What stands between a drafter and each engine, as far as the target's type tells: words, engine, [`serves`]."""
    faults = []
    for engine, version in ENGINES.items():
        served = serves(engine, kind, model_type)
        if served is False:
            told = f"{engine} {version} hands no hidden states of a {model_type} target to a {kind} drafter, and stops"
            faults.append((told, engine, served))
        elif served is None:
            told = f"whether {engine} {version} serves a {model_type} target with a {kind} drafter is not known here"
            faults.append((told, engine, served))
    return faults


def launch_commands(kind: str, target: str, drafter: str, num_draft_tokens: int) -> dict[str, str]:
    """
    The shell command that serves `target` with `drafter`, for each engine, quoted for a POSIX shell.

    Args:
        kind (`str`): Key in `DRAFTERS`.
        target, drafter (`str`): Ids or paths.
        num_draft_tokens (`int`): K.
    """
    speculation = json.dumps({"method": kind, "num_speculative_tokens": num_draft_tokens, "model": drafter})
    target, drafter = shlex.quote(target), shlex.quote(drafter)
    sglang = [
        f"python -m sglang.launch_server --model-path {target}",
        f"--speculative-algorithm {kind.upper()}",
        f"--speculative-draft-model-path {drafter}",
    ]
    if kind in _SGLANG_LENGTHS:
        sglang.append(_SGLANG_LENGTHS[kind].format(k=num_draft_tokens, block=num_draft_tokens + 1))
    return {
        "vLLM": f"vllm serve {target} \\\n    --speculative-config {shlex.quote(speculation)}",
        "SGLang": " \\\n    ".join(sglang),
    }
