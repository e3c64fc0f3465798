"""Runs that tests compare, on one rank or on several: one launch, many cases. Takes the path of a JSON file.

The file holds `folder`, where the results go, and `cases`: name → what to build, what to do, options of the config.
Cases share a launch because importing the libraries on every rank takes longer than all of them.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from runs import StopAt, make_trainer
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from draft_opd_trl import DraftOPDTrainer
from draft_opd_trl.commands.options import QuantizationArguments


class RecordingTrainer(DraftOPDTrainer):
    """Remembers the prompts of each set of texts this rank wrote or read."""

    def _write_texts(self, rows):
        self.prompts = [*getattr(self, "prompts", []), [row["prompt_ids"] for row in rows]]
        return super()._write_texts(rows)


class ShardedTrainer(RecordingTrainer):
    """accelerate reads the FSDP settings of its launcher on accelerators only; what follows runs with gloo too."""

    def __init__(self, drafter, target, args, **more):
        args.distributed_state.distributed_type = DistributedType.MULTI_GPU
        super().__init__(drafter, target, args, **more)


def build(case, output_dir, callbacks=()):
    texts = Dataset.from_json(case["texts"])
    return make_trainer(
        case["drafter"],
        case["target"],
        texts,
        output_dir,
        tokenizer=AutoTokenizer.from_pretrained(case["target"]),
        trainer_class=ShardedTrainer if case.get("fsdp") else RecordingTrainer,
        eval_dataset=texts.select_columns(["prompt_ids"]).select(range(case.get("eval_prompts", 1))),
        peft_config=LoraConfig(**case["lora"]) if "lora" in case else None,
        quantization_config=QuantizationArguments(**case.get("quantization", {})).quantization_config(),
        callbacks=list(callbacks),
        **{"max_steps": 5, "optim": "sgd", **case["options"]},
    )


def run_case(case, output_dir):
    """Train, or train, be cut off and resume; evaluate before and after. → what a test wants to see of this rank."""
    trainer = build(case, output_dir)
    before = trainer.evaluate() if "eval_prompts" in case else None
    if "cut_at" in case:
        trainer = build(case, output_dir, [StopAt(case["cut_at"])])
        trainer.train()
        trainer = build(case, output_dir)
        trainer.train(resume_from_checkpoint=str(Path(output_dir) / f"checkpoint-{case['cut_at']}"))
    else:
        trainer.train()
    trainer.save_model()
    return {
        "prompts": trainer.prompts,
        "remembered": [entry.tokens[: entry.prompt_length] for entry in trainer.error_buffer.entries.values()],
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "before": before,
        "after": trainer.evaluate() if "eval_prompts" in case else None,
        "sharded": [
            sum(isinstance(weight, DTensor) for weight in model.parameters())
            for model in (trainer.model, trainer.target.model)
        ],
    }


def main(file):
    spec = json.loads(Path(file).read_text())
    for name, case in spec["cases"].items():
        output_dir = Path(spec["folder"]) / name
        result = run_case(case, output_dir)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        (output_dir / f"rank{rank}.json").write_text(json.dumps(result))
    # A rank that leaves while another still talks to it can abort at exit.
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
