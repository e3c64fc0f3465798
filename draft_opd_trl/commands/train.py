"""Train a drafter by Draft-OPD, or by SFT with `--lmbda 0`.

Prompts are an id on the Hub, a folder written by `save_to_disk`, or a local .json / .jsonl file with a `prompt` column
(text or messages); with `--rollout_source dataset` also `completion`. On several GPUs:
`accelerate launch -m draft_opd_trl.cli train ...`. After Ctrl-C or a kill, the same command goes on with
`--resume_from_checkpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config import DraftOPDConfig
from .options import AdapterArguments, PairArguments, QuantizationArguments


@dataclass
class TrainArguments(PairArguments):
    """Which drafter, target and prompts."""

    dataset_name: str = field(metadata={"help": "Prompts: id, folder, or .json / .jsonl file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to take prompts from."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out to measure acceptance length on."})


ARGUMENTS = (TrainArguments, QuantizationArguments, AdapterArguments, DraftOPDConfig)
BARE = {"resume_from_checkpoint": "true"}


def run(
    arguments: TrainArguments, quantization: QuantizationArguments, adapter: AdapterArguments, config: DraftOPDConfig
) -> dict[str, Any]:
        from ..resuming import where_to_start
    from ..rows import hold_out, load_prompts
    from ..run_state import logged_before_training
    from ..trainer import DraftOPDTrainer

    # Before anything expensive.
    checkpoint = where_to_start(config)
    prompts = load_prompts(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)
    prompts, held_out = hold_out(prompts, arguments.num_eval_prompts, config.seed)
    trainer = DraftOPDTrainer(
        arguments.model_name_or_path,
        arguments.teacher_model_name_or_path,
        config,
        train_dataset=prompts,
        eval_dataset=held_out,
        peft_config=adapter.peft_config(),
        quantization_config=quantization.quantization_config(),
    )
    result: dict[str, Any] = {"output_dir": config.output_dir}
    if held_out is not None:
        before = checkpoint and logged_before_training(checkpoint, "eval_acceptance_length")
        result["before"] = before or trainer.evaluate()
    result["train"] = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()
    if held_out is not None:
        result["after"] = trainer.evaluate()
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return result


def show(result: dict[str, Any]) -> str:
    lines = [f"drafter written to {result['output_dir']}"]
    if "before" in result:
        before, after = (result[when]["eval_acceptance_length"] for when in ("before", "after"))
        lines.append(f"acceptance length: {before:.3f} before, {after:.3f} after")
    return "\n".join(lines)
