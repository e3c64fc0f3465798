"""Train the pocket drafter by SFT until its acceptance length stands still, and say so with numbers.

Small models keep few cores busy, so on a CPU one process a core is much faster than one with many threads:

    OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 4 examples/pocket/build.py drafter
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from tasks import problems
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from draft_opd_trl import (
    DraftOPDConfig,
    DraftOPDTrainer,
    MuonWithAdamW,
    SamplingParams,
    SpeculationSettings,
    Target,
    create_drafter,
    load_drafter,
    speculate,
    stop_token_ids,
)
from draft_opd_trl.core.files import atomic_folder
from draft_opd_trl.drafters import Drafter
from draft_opd_trl.texts.prompts import prompt_ids


MAX_NEW_TOKENS = 512


def shape_of(args: Namespace, tokenizer: PreTrainedTokenizerBase) -> dict:
    """What the architecture's `from_target` is given: one draft layer."""
    if args.drafter in ("dflash", "dspark"):
        mask_token_id = tokenizer.convert_tokens_to_ids("<|mask|>")
        own = {"block_size": args.block_size, "num_hidden_layers": 1, "mask_token_id": mask_token_id}
    else:
        own = {"num_draft_tokens": args.block_size - 1}
    return own | args.shape


def new_drafter(args: Namespace, target: Target, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """From the target, from an earlier run's drafter of any block size, or from one of another kind."""
    origin = load_drafter(args.origin) if args.origin else None
    if origin is not None and origin.kind != args.drafter:
        return create_drafter(args.drafter, target, from_drafter=origin, **args.shape)
    drafter = create_drafter(args.drafter, target, **shape_of(args, tokenizer))
    if origin is not None:
        drafter.load_state_dict(origin.state_dict())
    return drafter


def sft_prompts(tokenizer: PreTrainedTokenizerBase, first: int, last: int) -> list[list[int]]:
    """Tokenised prompts `first … last - 1` of the SFT split."""
    rows = problems("sft", last)[first:]
    return [prompt_ids([{"role": "user", "content": row["prompt"]}], tokenizer) for row in rows]


def written_texts(
    args: Namespace, config: DraftOPDConfig, target: Target, prompts: list[list[int]], temperature: float
) -> Dataset:
    """Texts the target writes, each process its share, kept in the work folder for a run that starts again."""
    state = config.distributed_state
    folders = [Path(args.work_dir) / f"texts-{len(prompts)}-t{temperature:g}-{rank}of{state.num_processes}"
               for rank in range(state.num_processes)]  # fmt: skip
    mine = folders[state.process_index]
    if not mine.is_dir():
        share = prompts[state.process_index :: state.num_processes]
        sampling = SamplingParams(temperature)
        settings = SpeculationSettings(MAX_NEW_TOKENS, stop_token_ids(target.model), sampling, batch_size=64)
        generator = torch.Generator().manual_seed(state.process_index)
        start = time.perf_counter()
        rollout = speculate(target, None, share, settings, generator)
        seconds = time.perf_counter() - start
        tokens = int(rollout.completion_lengths.sum())
        print(f"{len(share)} texts, {tokens} tokens in {seconds:.0f} s ({tokens / seconds:.0f} tokens/s)")
        with atomic_folder(mine) as part:
            Dataset.from_dict({"prompt_ids": share, "completion_ids": rollout.completions()}).save_to_disk(part)
    state.wait_for_everyone()
    return concatenate_datasets([Dataset.load_from_disk(str(folder)) for folder in folders])


def train_drafter(args: Namespace) -> None:
    """Warm up, hold the learning rate, decay it over the third quarter, and hold it low over the last."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.float32)
    target = Target(model)
    torch.manual_seed(args.seed)
    drafter = new_drafter(args, target, tokenizer)
    config = DraftOPDConfig(
        output_dir=str(Path(args.work_dir) / Path(args.output).name),
        lmbda=0.0,
        rollout_source="dataset",
        accepted_loss=args.loss,
        teacher_temperature=float(args.loss != "ce"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        num_anchors=args.num_anchors,
        max_completion_length=MAX_NEW_TOKENS,
        rollout_batch_size=64,
        eval_strategy="steps",
        eval_steps=max(args.steps // 16, 1),
        logging_steps=max(args.steps // 64, 1),
        save_steps=max(args.steps // 8, 1),
        save_total_limit=1,
        seed=args.seed,
        report_to="none",
        ddp_backend="gloo" if not torch.cuda.is_available() else None,
    )
    prompts = sft_prompts(tokenizer, 0, args.texts)
    texts = concatenate_datasets(
        [written_texts(args, config, target, prompts, temperature) for temperature in args.temperatures]
    )
    judged = sft_prompts(tokenizer, args.texts, args.texts + args.eval_prompts)
    optimizer = MuonWithAdamW(drafter.parameters(), lr=args.learning_rate)
    low = 0.1

    def schedule(step: int) -> float:
        share = step / args.steps
        decay = min(max((share - 0.5) / 0.25, 0.0), 1.0)
        return min((step + 1) / 50, 1 - (1 - low) * decay)

    trainer = DraftOPDTrainer(
        drafter,
        model,
        config,
        train_dataset=texts,
        eval_dataset=Dataset.from_dict({"prompt_ids": judged}),
        processing_class=tokenizer,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
    )
    done = any(Path(config.output_dir).glob("checkpoint-*"))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=done)
    seconds = time.perf_counter() - start
    if trainer.is_world_process_zero():
        judged_at = [log for log in trainer.state.log_history if "eval_acceptance_length" in log]
        curve = {log["step"]: log["eval_acceptance_length"] for log in judged_at}
        write_drafter(args, trainer, curve, seconds)


def write_drafter(args: Namespace, trainer: DraftOPDTrainer, curve: dict[int, float], seconds: float) -> None:
    """The drafter's folder with its report and card."""
    folder = Path(args.output)
    trainer.drafter.save_pretrained(folder)
    last_quarter = [tau for step, tau in curve.items() if step >= 0.75 * args.steps]
    report = {
        "drafter": args.drafter,
        "acceptance_length_by_step": curve,
        "change_over_last_quarter": last_quarter[-1] / last_quarter[0] - 1,
        "steps": args.steps,
        "texts": args.texts,
        "temperatures": args.temperatures,
        "shape": args.shape,
        "origin": args.origin,
        "loss": args.loss,
        "batch_size": args.batch_size * trainer.accelerator.num_processes,
        "num_anchors": args.num_anchors,
        "learning_rate": args.learning_rate,
        "eval_prompts": args.eval_prompts,
        "parameters": sum(parameter.numel() for parameter in trainer.drafter.parameters()),
        "block_size": args.block_size,
        "seconds": seconds,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2))
    (folder / "README.md").write_text(card(report))
    print(json.dumps(report, indent=2))


def card(report: dict) -> str:
    """The model card of a pocket drafter, from its report."""
    curve = "\n".join(f"| {step} | {tau:.3f} |" for step, tau in report["acceptance_length_by_step"].items())
    temperatures = " and ".join(f"{temperature:g}" for temperature in report["temperatures"])
    continued = f" This run went on from {report['origin']} (`--origin`)." if report["origin"] else ""
    loss = "hard cross-entropy" if report["loss"] == "ce" else f"the loss `{report['loss']}`, teacher at temperature 1"
    origin = f" --origin {report['origin']}" if report["origin"] else ""
    final = list(report["acceptance_length_by_step"].values())[-1]
    return f"""---
license: apache-2.0
tags: [speculative-decoding, draft-opd, {report["drafter"]}]
---

# Pocket drafter ({report["drafter"]})

A {report["drafter"]} drafter of {report["parameters"]:,} parameters and blocks of {report["block_size"]}
for the pocket target beside it (`../target`), trained by SFT.

- Acceptance length τ at temperature 0: **{final:.3f}** on {report["eval_prompts"]} prompts it was not trained on; it
  moved by {report["change_over_last_quarter"]:+.2%} over the last quarter of the steps.
- Trained on what the target answered to {report["texts"]:,} prompts at temperature {temperatures},
  {report["steps"]:,} steps of {report["batch_size"]} texts with
  {report["num_anchors"]} random anchors each, {loss}, with the architecture's slot weights, Muon at
  {report["learning_rate"]} on matrices and AdamW on the rest; the learning rate falls to a tenth in the third
  quarter.{continued}
- It took {report["seconds"]:.0f} s, judging included.

Rebuild it from the shipped target on 4 CPU cores with

```bash
OMP_NUM_THREADS=1 python -m torch.distributed.run --standalone --nproc_per_node 4 \\
    examples/pocket/build.py drafter --drafter {report["drafter"]} \\
    --block-size {report["block_size"]} --shape '{json.dumps(report["shape"])}' \\
    --temperatures {temperatures.replace(" and ", " ")} --loss {report["loss"]}{origin} \\
    --texts {report["texts"]} --steps {report["steps"]} --batch-size {report["batch_size"] // 4} \\
    --num-anchors {report["num_anchors"]}
```

| step | τ |
|---|---|
{curve}
"""
