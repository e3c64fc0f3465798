"""Measure any drafter–target pair by real speculative decoding.

    python examples/evaluate.py --model_name_or_path DRAFTER --teacher_model_name_or_path TARGET \
        --dataset_name prompts.jsonl --num_prompts 200 --temperature 0 --baseline

With no arguments: the pocket drafter on the pocket world's held-out prompts. Prints one JSON line at the end.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import torch
from pocket.quickstart import POCKET
from train import load_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from draft_opd_trl import (
    SamplingParams,
    SpeculationSettings,
    Target,
    bootstrap_interval,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.prompts import tokenize_dataset


@dataclass
class EvaluationArguments:
    """What to measure."""

    model_name_or_path: str = field(default=str(POCKET / "drafter-dflash"), metadata={"help": "Drafter."})
    teacher_model_name_or_path: str = field(default=str(POCKET / "target"), metadata={"help": "Target."})
    dataset_name: str = field(default=str(POCKET / "prompts" / "heldout.jsonl"), metadata={"help": "Prompts."})
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


def main(args: EvaluationArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.teacher_model_name_or_path)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.teacher_model_name_or_path, dtype=dtype).to(device)
    target = Target(model)
    drafter = load_drafter(args.model_name_or_path, dtype=target.dtype).to(device).bind(target)
    dataset = load_prompts(args.dataset_name, args.dataset_config, args.dataset_split)
    dataset = dataset.select(range(min(args.num_prompts, len(dataset))))
    kwargs = json.loads(args.chat_template_kwargs)
    prompts = list(tokenize_dataset(dataset, tokenizer, None, kwargs, name=args.dataset_name)["prompt_ids"])
    settings = SpeculationSettings(
        max_new_tokens=args.max_new_tokens,
        stop_token_ids=stop_token_ids(model, tokenizer),
        sampling=SamplingParams(args.temperature, args.top_k, args.top_p),
        sample_proposals=args.sample_proposals,
        batch_size=args.batch_size,
    )

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(args.seed)

    report = measure_acceptance(target, drafter, prompts, settings, generator(), "Speculating")
    low, high = bootstrap_interval(report)
    print(f"acceptance length τ {report.acceptance_length:.3f} [{low:.3f}, {high:.3f}], {len(prompts)} prompts")
    print("(tokens committed per verification, recovered or bonus token counted; 95 % bootstrap over prompts)")
    for slot, share in enumerate(report.acceptance_by_slot, start=1):
        print(f"  first {slot} accepted: {share:6.1%}")
    result = {**report.summary(), "interval": [low, high]}
    if args.baseline:
        start = time.perf_counter()
        plain = speculate(target, None, prompts, settings, generator())
        seconds = time.perf_counter() - start
        result["plain_tokens_per_second"] = int(plain.completion_lengths.sum()) / seconds
        result["speedup"] = result["tokens_per_second"] / result["plain_tokens_per_second"]
        print(f"speedup over plain decoding by the same engine: {result['speedup']:.2f}")
        if settings.sampling.greedy:
            pairs = zip(plain.completions(), report.completions, strict=True)
            result["texts_changed"] = sum(ours != theirs for ours, theirs in pairs)
            print(f"texts that differ from plain greedy decoding: {result['texts_changed']}")
    print(json.dumps(result))


if __name__ == "__main__":
    main(*HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses())
