"""Train a drafter with Draft-OPD (or, with `--lmbda 0`, by SFT).

    accelerate launch examples/train.py                       # the pocket quickstart: SFT against Draft-OPD
    accelerate launch examples/train.py --config recipe.yaml  # any option below, from YAML
    accelerate launch examples/train.py \
        --model_name_or_path z-lab/Qwen3-4B-DFlash-b16 \
        --teacher_model_name_or_path Qwen/Qwen3-4B \
        --dataset_name prompts.jsonl --output_dir my-drafter

A data set is an id on the Hub, a folder written by `save_to_disk`, or a local .json / .jsonl file. It needs a `prompt`
column (text or messages); with `--rollout_source dataset` also `completion`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from pocket.quickstart import run_quickstart
from trl import TrlParser

from draft_opd_trl import DraftOPDConfig, DraftOPDTrainer


@dataclass
class ScriptArguments:
    """Which drafter, target and prompts; all unset runs the pocket quickstart."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Drafter: path or id."})
    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Target: path or id."})
    dataset_name: str | None = field(default=None, metadata={"help": "Id, folder, or local .json / .jsonl file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to take prompts from."})
    drafter: str = field(default="dflash", metadata={"help": "Architecture the pocket quickstart starts from."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out to measure acceptance length on."})


def load_prompts(name: str, config: str | None, split: str) -> Dataset:
    """Prompts from the Hub, a saved folder or a local JSON file."""
    path = Path(name)
    if path.suffix in (".json", ".jsonl"):
        if not path.is_file():
            raise FileNotFoundError(f"--dataset_name {name} is not a file here. Give its path.")
        return load_dataset("json", data_files=str(path), split="train")
    if path.is_dir() and (path / "state.json").is_file():
        return load_from_disk(name)
    return load_dataset(name, config, split=split)


def main(script: ScriptArguments, args: DraftOPDConfig) -> None:
    named = {
        "--model_name_or_path": script.model_name_or_path,
        "--teacher_model_name_or_path": script.teacher_model_name_or_path,
        "--dataset_name": script.dataset_name,
    }
    missing = [option for option, value in named.items() if value is None]
    if len(missing) == len(named):
        run_quickstart(args, kind=script.drafter)
        return
    if missing:
        raise SystemExit(
            f"Also give {' and '.join(missing)}: a drafter, its target and prompts belong together (or give none of "
            "the three, to run the pocket quickstart)."
        )
    dataset = load_prompts(script.dataset_name, script.dataset_config, script.dataset_train_split)
    held_out = None
    if script.num_eval_prompts:
        if len(dataset) <= script.num_eval_prompts:
            raise SystemExit(
                f"--num_eval_prompts {script.num_eval_prompts} leaves nothing to train on: the data set has "
                f"{len(dataset)} rows. Lower it."
            )
        parts = dataset.train_test_split(test_size=script.num_eval_prompts, seed=args.seed)
        dataset, held_out = parts["train"], parts["test"]
    trainer = DraftOPDTrainer(
        script.model_name_or_path,
        script.teacher_model_name_or_path,
        args,
        train_dataset=dataset,
        eval_dataset=held_out,
    )
    before = trainer.evaluate()["eval_acceptance_length"] if held_out is not None else None
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    if held_out is not None:
        after = trainer.evaluate()["eval_acceptance_length"]
        trainer.accelerator.print(f"acceptance length: {before:.3f} before, {after:.3f} after")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, DraftOPDConfig)).parse_args_and_config())
