"""Show what verification said of a drafter, token by token: an HTML page, or the terminal.

The target writes answers to the prompts, sped up by the drafter. The page shows each text as its blocks: what was
accepted, what was rejected and what the target wanted instead, with the probabilities both gave. `--compare` puts a
second drafter beside the first, on the same texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .options import PairArguments


@dataclass
class TraceArguments(PairArguments):
    """Which texts, and where they are shown."""

    dataset_name: str = field(
        metadata={"help": "Prompts: id, folder, or .json / .jsonl file.", "aliases": ["--prompts"]}
    )
    compare: str | None = field(
        default=None, metadata={"help": "A second drafter on the same texts, such as the first one after training."}
    )
    output_file: str = field(default="trace.html", metadata={"help": "The page."})
    terminal: bool = field(default=False, metadata={"help": "Print the traces; write no page."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    num_prompts: int = field(default=20, metadata={"help": "Prompts to trace, from the first."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of the target."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the target."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the target."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion."})
    batch_size: int = field(default=16, metadata={"help": "Rows decoded side by side."})
    dtype: str = field(default="float32", metadata={"help": "Of the target: float32, bfloat16, auto."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON passed to the chat template."})
    seed: int = field(default=0, metadata={"help": "At temperature > 0."})


ARGUMENTS = (TraceArguments,)


def _names(arguments: TraceArguments) -> dict[str, str]:
    """Drafters by the name they are shown under: the folder's own where that tells them apart."""
    from pathlib import Path

    paths = [arguments.model_name_or_path, *([arguments.compare] if arguments.compare else [])]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--compare {arguments.compare} is the drafter of --model itself. Name another one.")
    short = [Path(path).name for path in paths]
    return dict(zip(short if len(set(short)) == len(paths) else paths, paths, strict=True))


def run(arguments: TraceArguments) -> dict[str, Any]:
    import json
    from dataclasses import asdict

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..checkpoints import load_drafter
    from ..evaluation import measure_acceptance
    from ..loading import load_prompts
    from ..prompts import tokenize_dataset
    from ..records import Rollout
    from ..sampling import SamplingParams
    from ..speculation import SpeculationSettings
    from ..target import Target, stop_token_ids
    from ..traces import trace_texts
    from ..viewer import write_page

    names = _names(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher_model_name_or_path)
    dataset = load_prompts(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    dataset = dataset.select(range(min(arguments.num_prompts, len(dataset))))
    kwargs = json.loads(arguments.chat_template_kwargs)
    prompts = list(tokenize_dataset(dataset, tokenizer, None, kwargs, name=arguments.dataset_name)["prompt_ids"])
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.teacher_model_name_or_path, dtype=dtype).to(device)
    target = Target(model)
    drafters = {name: load_drafter(path, dtype=target.dtype).to(device).bind(target) for name, path in names.items()}
    sampling = SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p)
    settings = SpeculationSettings(
        max_new_tokens=arguments.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        sampling=sampling,
        batch_size=arguments.batch_size,
    )
    generator = torch.Generator(device).manual_seed(arguments.seed)
    written = measure_acceptance(target, next(iter(drafters.values())), prompts, settings, generator, "Writing texts")
    # Replayed for each drafter in the same way, so that what differs is the drafter.
    texts = Rollout.from_ids(prompts, written.completions, device=device)
    traces = {name: trace_texts(target, drafter, texts, tokenizer, sampling) for name, drafter in drafters.items()}
    file = None if arguments.terminal else arguments.output_file
    if file is not None:
        write_page(file, traces, f"{target.name}, temperature {arguments.temperature:g}")
    return {"file": file, "traces": {name: [asdict(trace) for trace in part] for name, part in traces.items()}}


def show(result: dict[str, Any]) -> str:
    import sys

    from rich.console import Console

    from ..traces import Trace
    from ..viewer import print_traces

    traces = {name: [Trace.from_dict(trace) for trace in part] for name, part in result["traces"].items()}
    if result["file"] is not None:
        count = len(next(iter(traces.values())))
        return f"{count} texts written to {result['file']}"
    console = Console(file=sys.__stdout__)  # where the text goes decides on colours
    with console.capture() as shown:
        print_traces(traces, console)
    return shown.get().rstrip("\n")
