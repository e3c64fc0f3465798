"""How the engines are started with a drafter. Knows no models."""

from __future__ import annotations

import json


# What SGLang also needs to be told; vLLM reads the rest from the folder.
_SGLANG_LENGTHS = {
    "eagle3": "--speculative-num-steps {k} --speculative-eagle-topk 1 --speculative-num-draft-tokens {block}"
}


def launch_commands(kind: str, target: str, drafter: str, num_draft_tokens: int) -> dict[str, str]:
    """
    The shell command that serves `target` with `drafter`, for each engine.

    Args:
        kind (`str`): Key in `DRAFTERS`.
        target, drafter (`str`): Ids or paths.
        num_draft_tokens (`int`): K.
    """
    speculation = json.dumps({"method": kind, "num_speculative_tokens": num_draft_tokens, "model": drafter})
    sglang = [
        f"python -m sglang.launch_server --model-path {target}",
        f"--speculative-algorithm {kind.upper()}",
        f"--speculative-draft-model-path {drafter}",
    ]
    if kind in _SGLANG_LENGTHS:
        sglang.append(_SGLANG_LENGTHS[kind].format(k=num_draft_tokens, block=num_draft_tokens + 1))
    return {
        "vLLM": f"vllm serve {target} \\\n    --speculative-config '{speculation}'",
        "SGLang": " \\\n    ".join(sglang),
    }
