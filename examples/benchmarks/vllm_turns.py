"""One vLLM that is told again and again what to decode; runs in vLLM's own environment. Usage: SETTINGS as JSON.

Reads a line of JSON for each turn: `prompts` (token ids), `concurrency` (texts under way at once), `max_new_tokens`,
`stops`, and `num_draft_tokens` (K of this turn). Writes a line of what it took and counted. One process serves every
K, so that turns can alternate and a machine that slows down slows all of them.
"""

import json
import sys
import time

from vllm import LLM, SamplingParams


COUNTERS = ("vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens")


def counts(llm):
    return {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTERS}


def turn(llm, job, name):
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_new_tokens"], detokenize=False)
    greedy.stop_token_ids = job["stops"]
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    if scheduler.dynamic_sd_lookup is not None:
        scheduler.dynamic_sd_lookup = [job["num_draft_tokens"]] * len(scheduler.dynamic_sd_lookup)
    waiting = list(enumerate(job["prompts"]))[::-1]
    before, running, texts = counts(llm), 0, {}
    start = time.perf_counter()
    while waiting or running:
        while waiting and running < job["concurrency"]:
            index, prompt = waiting.pop()
            llm.llm_engine.add_request(f"{name}-{index}", {"prompt_token_ids": prompt}, greedy)
            running += 1
        for output in llm.llm_engine.step():
            if output.finished:
                texts[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
                running -= 1
    seconds, after = time.perf_counter() - start, counts(llm)
    drafts, accepted = (int(after.get(name, 0) - before.get(name, 0)) for name in COUNTERS)
    completions = [texts[index] for index in sorted(texts)]
    return {"seconds": seconds, "drafts": drafts, "accepted": accepted, "texts": completions}


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    llm = LLM(disable_log_stats=False, **json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        print(json.dumps(turn(llm, json.loads(line), number)), file=answers, flush=True)


if __name__ == "__main__":
    main()
