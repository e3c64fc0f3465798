"""An engine for tests: it speculates with a drafter of ours, and tells of it in vLLM's or in SGLang's shapes."""

import json
import threading
from http.server import BaseHTTPRequestHandler

from completions_server import LocalServer

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.seeding import seed_of
from draft_opd_trl.decoding.speculation import SpeculationSettings
from draft_opd_trl.evaluation.measure import measure_acceptance


class EngineServer(LocalServer):
    """
    Args:
        target, drafter: What it serves; no drafter: it does not speculate.
        tokenizer: Whose template it has.
        engine (`str`): `"vLLM"` or `"SGLang"`.
        tells (`str`): `"answer"`, `"counters"` or `"nothing"`.
        kwargs (`dict`, *optional*): Given to the template instead of what requests say.
        others (`int`): Requests of others, of 10 tokens and 5 verifications each, at each of ours.
        forgets (`Callable`, *optional*): A drafter for prompts that were seen before, `forgets(drafter)`.
        sample_proposals (`bool`): Draw proposals above temperature 0.
        started (`dict`): More of what SGLang's /server_info says.
    """

    def __init__(
        self,
        target,
        drafter,
        tokenizer,
        engine="vLLM",
        tells="answer",
        kwargs=None,
        others=0,
        forgets=None,
        sample_proposals=False,
        started=(),
    ):
        self.target, self.drafter, self.tokenizer, self.engine = target, drafter, tokenizer, engine
        self.tells, self.kwargs, self.others = tells, kwargs, others
        self.forgets, self.sample_proposals, self.started = forgets, sample_proposals, dict(started)
        self.reports, self.seen, self.asked = [], set(), []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                pages = {"/version": server.version, "/server_info": server.info, "/metrics": server.metrics}
                self.answer(pages[self.path]() if self.path in pages else None)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    pages = {"/tokenize": server.tokenize, "/v1/completions": server.complete}
                    self.answer(pages[self.path](body) if self.path in pages else None)

            def answer(self, page):
                data = page.encode() if isinstance(page, str) else json.dumps(page).encode()
                self.send_response(404 if page is None else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        super().__init__(Handler)

    def version(self):
        return {"version": "0.32.0"} if self.engine == "vLLM" else None

    def info(self):
        if self.engine == "vLLM":
            return None
        algorithm = None if self.drafter is None else "DFLASH"
        return {"speculative_algorithm": algorithm, "version": "0.5.23", **self.started}

    def tokenize(self, body):
        if isinstance(body.get("prompt"), str):
            return {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
        kwargs = (body.get("chat_template_kwargs") or {}) if self.kwargs is None else self.kwargs
        written = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_dict=True, **kwargs
        )
        return {"tokens": written["input_ids"]}

    def complete(self, body):
        prompt = tuple(body["prompt"])
        sampling = SamplingParams(body["temperature"])
        settings = SpeculationSettings(
            body["max_tokens"],
            body["stop_token_ids"] or [0],
            sampling,
            sample_proposals=self.sample_proposals and not sampling.greedy,
        )
        drafter = self.drafter
        if self.forgets and prompt in self.seen:
            drafter = self.forgets(drafter)
        if body["max_tokens"] > 16:  # what is asked before is no prompt of a suite
            self.seen.add(prompt)
            self.asked.append(prompt)
        report = measure_acceptance(self.target, drafter, [prompt], settings, seeds=[seed_of(body["seed"], "engine")])
        self.reports.append(report)
        [ids], [runs], [stopped] = report.completions, report.accepted, report.stopped
        choice = {"index": 0, "text": "", "finish_reason": "stop" if stopped else "length", "token_ids": ids}
        told = {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}
        if drafter is not None and self.tells == "answer":
            told |= self.metadata(runs, report.num_draft_tokens)
        return told

    def metadata(self, runs, slots):
        histogram = [runs.count(accepted) for accepted in range(slots + 1)]
        if self.engine == "vLLM":
            told = {
                "acceptance_histogram": histogram,
                "num_spec_steps": len(runs),
                "num_draft_tokens": slots * len(runs),
                "num_spec_tokens": slots,
            }
            return {"metrics": {"speculative_decoding": told}}
        if not runs:
            return {}
        longest = max(runs, default=0)
        told = {
            "spec_verify_ct": len(runs),
            "spec_num_proposed_drafts": slots * len(runs),
            "spec_correct_drafts_histogram": histogram[: longest + 1],
        }
        return {"sglext": {"spec_tokens_details": told}}

    def metrics(self):
        """Of everything since the start, as two engines behind one address count it."""
        runs = [run for report in self.reports for run in report.accepted[0]]
        slots = self.drafter.num_draft_tokens if self.drafter is not None else 0
        more = self.others * len(self.reports)
        counted = {
            "vllm:request_success": len(self.reports) + more,
            "vllm:generation_tokens": sum(report.tokens for report in self.reports) + 10 * more,
            "vllm:prefix_cache_hits": 0,
        }
        if self.drafter is not None and self.tells == "counters":
            counted["vllm:spec_decode_num_drafts"] = len(runs) + 5 * more
        lines = [f'{name}_total{{engine="0",model_name="m"}} {float(value)}' for name, value in counted.items()]
        if self.drafter is not None and self.tells == "counters":
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="m",position="{slot}"}} '
                f"{float(sum(run > slot for run in runs))}"
                for slot in range(slots)
            ]
        if self.engine == "SGLang":
            return None
        return "# HELP vllm:request_success_total Count.\n" + "\n".join(lines) + "\n"
