"""Train a drafter by Draft-OPD, or by SFT with `--lmbda 0`.

Prompts are an id on the Hub, a folder written by `save_to_disk`, or a local .json / .jsonl file with a `prompt` column
(text or messages); with `--rollout_source dataset` also `completion`. On several GPUs:
`accelerate launch -m draft_opd_trl.cli train ...`. After Ctrl-C or a kill, the same command goes on with
`--resume_from_checkpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.config import DraftOPDConfig
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
    from ..evaluation.before_after import results_of, write_results
    from ..texts.rows import hold_out, load_prompts
    from ..training.resuming import where_to_start
    from ..training.trainer import DraftOPDTrainer

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
    # A resumed run remembers what was measured before its first step.
    if held_out is not None and checkpoint is None:
        trainer.evaluate()
    result: dict[str, Any] = {"output_dir": config.output_dir}
    result["train"] = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()
    if held_out is not None:
        trainer.evaluate()
        called = _names(arguments.model_name_or_path, config.output_dir)
        result |= results_of(trainer.measured, "eval", called, trainer.law)
        if trainer.is_world_process_zero():
            write_results(result, Path(config.output_dir))
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return result


def _names(start: str, output: str) -> tuple[str, str]:
    """What a table calls the drafter that was given and the one that was trained."""
    given, trained = Path(start).absolute().name, Path(output).absolute().name
    return ("start" if given == trained else given), trained


def show(result: dict[str, Any]) -> str:
    lines = [f"drafter written to {result['output_dir']}"]
    if "table" in result:
        lines += ["", f"{result['prompts']} held-out prompts, {result['law']}", "", result["table"]]
        if result["before"] is None:
            lines += ["", "Not measured before training on these prompts, so there is no change to tell."]
    return "\n".join(lines)
