"""Measure a drafter on its target by real speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .options import PairArguments


@dataclass
class EvaluateArguments(PairArguments):
    """What to measure."""

    dataset_name: str = field(metadata={"help": "Prompts: id, folder, or .json / .jsonl file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub data set."})
    num_prompts: int = field(default=200, metadata={"help": "Prompts to decode, from the first."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature of the target."})
    top_k: int = field(default=0, metadata={"help": "Top-k of the target."})
    top_p: float = field(default=1.0, metadata={"help": "Top-p of the target."})
    sample_proposals: bool = field(default=False, metadata={"help": "Draw proposals instead of taking the argmax."})
    max_new_tokens: int = field(default=512, metadata={"help": "Longest completion."})
    batch_size: int = field(default=16, metadata={"help": "Rows decoded side by side."})
    dtype: str = field(default="float32", metadata={"help": "Of the target: float32, bfloat16, auto."})
    chat_template_kwargs: str = field(default="{}", metadata={"help": "JSON passed to the chat template."})
    baseline: bool = field(default=False, metadata={"help": "Also time plain decoding and check losslessness."})
    seed: int = field(default=0, metadata={"help": "At temperature > 0."})


ARGUMENTS = (EvaluateArguments,)


def run(arguments: EvaluateArguments) -> dict[str, Any]:
    import json
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..checkpoints import load_drafter
    from ..evaluation import bootstrap_interval, measure_acceptance
    from ..loading import load_prompts
    from ..prompts import tokenize_dataset
    from ..sampling import SamplingParams
    from ..speculation import SpeculationSettings, speculate
    from ..target import Target, stop_token_ids

    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher_model_name_or_path)
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.teacher_model_name_or_path, dtype=dtype).to(device)
    target = Target(model)
    drafter = load_drafter(arguments.model_name_or_path, dtype=target.dtype).to(device).bind(target)
    dataset = load_prompts(arguments.dataset_name, arguments.dataset_config, arguments.dataset_split)
    dataset = dataset.select(range(min(arguments.num_prompts, len(dataset))))
    kwargs = json.loads(arguments.chat_template_kwargs)
    prompts = list(tokenize_dataset(dataset, tokenizer, None, kwargs, name=arguments.dataset_name)["prompt_ids"])
    settings = SpeculationSettings(
        max_new_tokens=arguments.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        sampling=SamplingParams(arguments.temperature, arguments.top_k, arguments.top_p),
        sample_proposals=arguments.sample_proposals,
        batch_size=arguments.batch_size,
    )

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(arguments.seed)

    report = measure_acceptance(target, drafter, prompts, settings, generator(), "Speculating")
    result = {**report.summary(), "interval": list(bootstrap_interval(report))}
    if arguments.baseline:
        start = time.perf_counter()
        plain = speculate(target, None, prompts, settings, generator())
        result["plain_tokens_per_second"] = int(plain.completion_lengths.sum()) / (time.perf_counter() - start)
        result["speedup"] = result["tokens_per_second"] / result["plain_tokens_per_second"]
        if settings.sampling.greedy:
            pairs = zip(plain.completions(), report.completions, strict=True)
            result["texts_changed"] = sum(ours != theirs for ours, theirs in pairs)
    return result


def show(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    lines = [
        f"acceptance length τ {result['acceptance_length']:.3f} [{low:.3f}, {high:.3f}], {result['prompts']} prompts",
        "(tokens committed per verification, recovered or bonus token counted; 95 % bootstrap over prompts)",
    ]
    for slot, share in enumerate(result["acceptance_by_slot"], start=1):
        lines.append(f"  first {slot} accepted: {share:6.1%}")
    if "speedup" in result:
        lines.append(f"speedup over plain decoding by the same engine: {result['speedup']:.2f}")
    if "texts_changed" in result:
        lines.append(f"texts that differ from plain greedy decoding: {result['texts_changed']}")
    return "\n".join(lines)
