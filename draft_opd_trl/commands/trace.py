"""Show what verification said of a drafter, token by token: an HTML page, or the terminal.

The target writes answers to the prompts, sped up by the drafter. The page shows each text as its blocks: what was
accepted, what was rejected and what the target wanted instead, with the probabilities both gave. `--compare` puts
another drafter beside it, on the same texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .options import PairArguments, drafters_by_name, read_chat_kwargs


@dataclass
class TraceArguments(PairArguments):
    """Which texts, and where they are shown."""

    suite: str = field(
        metadata={
            "help": "Suite or data set of prompts, as `draft-opd evaluate` takes them.",
            "aliases": ["--prompts"],
        }
    )
    suite_path: str | None = field(default=None, metadata={"help": "A local copy of the suite, without a network."})
    num_prompts: int = field(default=20, metadata={"help": "Prompts to trace."})
    compare: str | None = field(
        default=None, metadata={"help": "Another drafter, shown before --model, such as that one before training."}
    )
    output_file: str = field(default="trace.html", metadata={"help": "The page."})
    terminal: bool = field(default=False, metadata={"help": "Print the traces; write no page."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of the target."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the target."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the target."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion."})
    batch_size: int = field(default=16, metadata={"help": "Texts decoded side by side."})
    dtype: str = field(default="float32", metadata={"help": "Of the target: float32, bfloat16, auto."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON passed to the chat template."})
    seed: int = field(default=0, metadata={"help": "At temperature > 0."})


ARGUMENTS = (TraceArguments,)


def run(arguments: TraceArguments) -> dict[str, Any]:
    from dataclasses import asdict
    from pathlib import Path

    import torch

    from ..core.files import check_writable
    from ..core.records import Rollout
    from ..core.sampling_params import SamplingParams
    from ..core.target import stop_token_ids
    from ..decoding.speculation import SpeculationSettings
    from ..evaluation.measure import measure_acceptance
    from ..evaluation.suites import load_suite
    from ..evaluation.traces import trace_texts
    from ..evaluation.viewer import write_trace_page
    from ..texts.prompts import check_fit, tokenize_dataset
    from ..training.loading import check_pair, load_pair

    compared = [arguments.compare] if arguments.compare else []
    names = drafters_by_name([*compared, arguments.model_name_or_path])
    chat = read_chat_kwargs(arguments.chat_template_kwargs)
    sampling = SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p)
    if not arguments.terminal:
        check_writable(Path(arguments.output_file).parent)
    suite = load_suite(arguments.suite, arguments.suite_path, arguments.num_prompts)
    models = (list(names.values()), arguments.teacher_model_name_or_path)
    tokenizer = check_pair(*models)
    rows = tokenize_dataset(suite, tokenizer, None, chat, name=arguments.suite)
    target, drafters, _ = load_pair(*models, arguments.dtype)
    longest_block = max(drafter.num_draft_tokens for drafter in drafters)
    check_fit(
        {arguments.suite: rows}, target.vocab_size, target.context_length, arguments.max_new_tokens, longest_block
    )
    prompts = list(rows["prompt_ids"])
    settings = SpeculationSettings(
        max_new_tokens=arguments.max_new_tokens,
        stop_token_ids=stop_token_ids(target.model, tokenizer),
        sampling=sampling,
        batch_size=arguments.batch_size,
    )
    generator = torch.Generator(target.device).manual_seed(arguments.seed)
    written = measure_acceptance(target, drafters[-1], prompts, settings, generator, "Writing texts")
    # Replayed for each drafter in the same way, so that what differs is the drafter.
    texts = Rollout.from_ids(prompts, written.completions, device=target.device)
    traces = {
        name: trace_texts(target, drafter, texts, tokenizer, sampling)
        for name, drafter in zip(names, drafters, strict=True)
    }
    file = None if arguments.terminal else arguments.output_file
    if file is not None:
        write_trace_page(file, traces, f"{target.name}, temperature {arguments.temperature:g}")
    return {"file": file, "traces": {name: [asdict(trace) for trace in part] for name, part in traces.items()}}


def show(result: dict[str, Any]) -> str:
    import sys

    from rich.console import Console

    from ..evaluation.traces import Trace
    from ..evaluation.viewer import print_traces

    traces = {name: [Trace.from_dict(trace) for trace in part] for name, part in result["traces"].items()}
    if result["file"] is not None:
        count = len(next(iter(traces.values())))
        return f"{count} texts written to {result['file']}"
    console = Console(file=sys.__stdout__)  # where the text goes decides on colours
    with console.capture() as shown:
        print_traces(traces, console)
    return shown.get().rstrip("\n")
