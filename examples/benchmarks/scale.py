"""What scaling costs in τ, on the pocket world: ranks, adapters, quantised targets.

    python examples/benchmarks/scale.py --output_dir outputs/scale

LoRA of rank 16 against all weights, from the same drafter, on the same texts, at equal steps (`lora_tau`, `full_tau`).
A drafter trained against each precision of the target, judged against both (`nf4`). Whether two ranks train what one
process trains (`ddp_equal`, the largest difference of a weight). How far the memory plan is off (`plan_error`). Ends
by printing one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser


EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from pocket import POCKET, read_prompts  # noqa: E402

from draft_opd_trl import (  # noqa: E402
    AcceptanceReport,
    DraftOPDConfig,
    DraftOPDTrainer,
    SpeculationSettings,
    Target,
    bootstrap_interval,
    load_drafter,
    measure_acceptance,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import write_atomically  # noqa: E402


START = str(POCKET / "drafter-dflash")
BATCH = 8


@dataclass
class ScaleArguments:
    """How much of it."""

    output_dir: str = field(default="outputs/scale", metadata={"help": "Folder for drafters and results.json."})
    steps: int = field(default=300, metadata={"help": "Optimizer steps of each arm, 8 texts each."})
    texts: int = field(default=1600, metadata={"help": "Texts to train on."})
    eval_prompts: int = field(default=400, metadata={"help": "Held-out prompts."})
    learning_rate: float = field(default=2e-4, metadata={"help": "AdamW, all weights."})
    lora_learning_rate: float = field(default=1e-3, metadata={"help": "AdamW, the adapter."})
    seed: int = field(default=0, metadata={"help": "Order of texts and start of the adapter."})


def load_target(precision: str) -> Target:
    """The pocket target in float32, or with its layers in nf4 (embedding and head stay float32)."""
    options = {"dtype": torch.float32}
    if precision == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    return Target(AutoModelForCausalLM.from_pretrained(POCKET / "target", **options))


def train(
    args: ScaleArguments,
    name: str,
    target: Target,
    tokenizer: Any,
    texts: Dataset,
    learning_rate: float,
    peft_config: PeftConfig | None = None,
) -> float:
    """One arm of Draft-OPD; writes its drafter and returns the seconds it took."""
    config = DraftOPDConfig(
        str(Path(args.output_dir) / name),
        max_steps=args.steps,
        optim="adamw_torch",
        learning_rate=learning_rate,
        seed=args.seed,
        rollout_source="dataset",
        per_device_train_batch_size=BATCH,
        num_anchors=32,
        max_completion_length=512,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
    )
    trainer = DraftOPDTrainer(START, target.model, config, texts, processing_class=tokenizer, peft_config=peft_config)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model()
    return seconds


def ddp_difference(args: ScaleArguments, texts: Dataset) -> float:
    """Largest difference of a weight after 5 steps of SGD: one process with 8 texts a step, two ranks with 4 each."""
    file = Path(args.output_dir) / "texts.jsonl"
    texts.to_json(file)
    trained = []
    for ranks in (1, 2):
        folder = Path(args.output_dir) / f"ranks-{ranks}"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += [str(EXAMPLES / "train.py"), "--ddp_backend", "gloo", "--use_cpu", "--num_eval_prompts", "0"]
        command += ["--model_name_or_path", START, "--teacher_model_name_or_path", str(POCKET / "target")]
        command += ["--teacher_model_init_kwargs", '{"dtype": "float32"}', "--dataset_name", str(file)]
        command += ["--rollout_source", "dataset", "--max_completion_length", "512", "--max_steps", "5"]
        command += ["--per_device_train_batch_size", str(BATCH // ranks), "--optim", "sgd", "--learning_rate", "0.01"]
        command += ["--lr_scheduler_type", "constant", "--warmup_steps", "0", "--report_to", "none"]
        command += ["--output_dir", str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)})
        trained.append(load_drafter(str(folder)).state_dict())
    one, two = trained
    return max(float((value - two[name]).abs().max()) for name, value in one.items())


def plan_error() -> float:
    """Largest relative error of the memory plan, from the benchmark beside this one."""
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "memory.py")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])["plan_error"]


def difference(first: AcceptanceReport, second: AcceptanceReport) -> list[float]:
    """τ(first) − τ(second) and its paired 95 % interval over prompts."""
    return [first.acceptance_length - second.acceptance_length, *bootstrap_interval(first, second)]


def main(args: ScaleArguments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    prompts = read_prompts(tokenizer, "quickstart.jsonl", args.texts)
    held_out = read_prompts(tokenizer, "heldout.jsonl", args.eval_prompts)
    targets = {precision: load_target(precision) for precision in ("float32", "nf4")}
    stops = stop_token_ids(targets["float32"].model, tokenizer)
    settings = SpeculationSettings(512, stops, batch_size=64)
    texts = {}
    for precision, target in targets.items():
        drafter = load_drafter(START).bind(target)
        completions = speculate(target, drafter, prompts, settings).completions()
        texts[precision] = Dataset.from_dict({"prompt_ids": prompts, "completion_ids": completions})
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    seconds = {
        "full": train(args, "full", targets["float32"], tokenizer, texts["float32"], args.learning_rate),
        "lora": train(args, "lora", targets["float32"], tokenizer, texts["float32"], args.lora_learning_rate, lora),
        "nf4": train(args, "nf4", targets["nf4"], tokenizer, texts["nf4"], args.learning_rate),
    }
    reports = {
        (name, precision): measure_acceptance(target, load_drafter(path).bind(target), held_out, settings)
        for name, path in {"start": START, **{arm: str(Path(args.output_dir) / arm) for arm in seconds}}.items()
        for precision, target in targets.items()
    }
    results = {
        "full_tau": reports["full", "float32"].acceptance_length,
        "lora_tau": reports["lora", "float32"].acceptance_length,
        "lora_minus_full": difference(reports["lora", "float32"], reports["full", "float32"]),
        "tau": {f"{name} on {precision}": report.acceptance_length for (name, precision), report in reports.items()},
        "nf4_minus_full_on_nf4": difference(reports["nf4", "nf4"], reports["full", "nf4"]),
        "nf4_minus_full_on_float32": difference(reports["nf4", "float32"], reports["full", "float32"]),
        "texts_that_nf4_changes": sum(
            ours != theirs
            for ours, theirs in zip(texts["nf4"]["completion_ids"], texts["float32"]["completion_ids"], strict=True)
        ),
        "seconds": seconds,
        "arguments": vars(args),
        "ddp_difference": ddp_difference(args, texts["float32"]),
    }
    results["ddp_equal"] = results["ddp_difference"] < 1e-5
    results["plan_error"] = plan_error()
    write_atomically(Path(args.output_dir) / "results.json", json.dumps(results, indent=2))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*HfArgumentParser(ScaleArguments).parse_args_into_dataclasses())
