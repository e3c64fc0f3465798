"""Serve prompts with vLLM, and count what its verifications said. Usage: JOB RESULT."""

import sys
import traceback

import torch
from vllm import LLM, SamplingParams


def serve(job):
    speculation = job["speculation"]
    if speculation and speculation["method"] == "dspark":
        from dspark_on_cpu import as_dflash

        speculation = as_dflash(speculation)
    llm = LLM(
        model=job["target"],
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,
        disable_log_stats=False,
        speculative_config=speculation,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False)
    greedy.stop_token_ids = job["stops"]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], greedy, use_tqdm=False)
    counts = {metric.name: metric for metric in llm.get_metrics() if "spec_decode" in metric.name}
    return {
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "counts": {
            name.removeprefix("vllm:spec_decode_"): metric.values if hasattr(metric, "values") else metric.value
            for name, metric in counts.items()
        },
    }


if __name__ == "__main__":
    job = torch.load(sys.argv[1])
    try:
        result = serve(job)
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, sys.argv[2])
