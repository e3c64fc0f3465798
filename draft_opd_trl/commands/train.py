"""Train a drafter by Draft-OPD, by SFT, or by one after the other; measured before and after, ready to be served.

Prompts are an id on the Hub, a folder written by `save_to_disk`, or a local .json / .jsonl file with a `prompt` column
(text or messages); with `--rollout_source dataset` also `completion`. A new drafter starts with `--sft_steps` or
`--sft_epochs`, in `<output_dir>/sft`; `--lmbda 0` is SFT alone. `--config` takes a YAML file of options, or the name
of one of the recipes that `draft-opd recipes` lists. On several GPUs: `accelerate launch -m draft_opd_trl.cli train
...`. After Ctrl-C or a kill, the same command goes on with `--resume_from_checkpoint`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import InputError
from ..evaluation.best_k import advised
from ..training.config import DraftOPDConfig
from .options import AdapterArguments, PairArguments, QuantizationArguments


if TYPE_CHECKING:
    from ..training.trainer import DraftOPDTrainer


@dataclass
class PromptArguments(PairArguments):
    """Which drafter, target and prompts."""

    dataset_name: str = field(metadata={"help": "Prompts: id, folder, or .json / .jsonl file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to take prompts from."})
    num_eval_prompts: int = field(default=64, metadata={"help": "Prompts held out to measure acceptance length on."})


@dataclass
class TrainArguments(PromptArguments):
    """And whether SFT comes first."""

    sft_steps: int = field(default=0, metadata={"help": "Steps of SFT before Draft-OPD; 0 leaves them out."})
    sft_epochs: float = field(default=0.0, metadata={"help": "The same, in passes over the prompts."})
    sft_learning_rate: float | None = field(
        default=None, metadata={"help": "Its peak; by default for a new drafter: muon 4e-3, others 6e-4."}
    )

    def sft_config(self, config: DraftOPDConfig, use_peft: bool) -> DraftOPDConfig | None:
        """
        Settings of the SFT stage, if one is asked for.

        Raises:
            `ValueError`: It contradicts what else is asked for.
        """
        if not self.sft_steps and not self.sft_epochs:
            if self.sft_learning_rate is not None:
                raise InputError("sft_learning_rate is set, but no SFT stage is. Set sft_steps, or leave it out.")
            return None
        if self.sft_steps and self.sft_epochs:
            raise InputError(
                f"sft_steps={self.sft_steps} and sft_epochs={self.sft_epochs:g} are both set. Choose one."
            )
        if not config.any_on_policy:
            raise InputError("lmbda=0 is SFT alone, so no SFT stage stands before it. Leave sft_steps or lmbda out.")
        if use_peft:
            raise InputError(
                "use_peft trains an adapter, and the SFT stage all weights. Run SFT by itself first (--lmbda 0), then "
                "this on its folder."
            )
        from ..training.stages import sft_config

        return sft_config(config, self.sft_steps, self.sft_epochs, self.sft_learning_rate)


ARGUMENTS = (TrainArguments, QuantizationArguments, AdapterArguments, DraftOPDConfig)
BARE = {"resume_from_checkpoint": "true"}
TRACED = 8  # held-out prompts on the page of traces


def run(
    arguments: TrainArguments, quantization: QuantizationArguments, adapter: AdapterArguments, config: DraftOPDConfig
) -> dict[str, Any]:
    from ..evaluation.before_after import results_of, write_results
    from ..texts.rows import hold_out, load_prompts
    from ..training.resuming import where_to_start
    from ..training.stages import Start, run_sft, run_stage, where_stages_start
    from ..training.trainer import DraftOPDTrainer

    # Before anything expensive.
    sft = arguments.sft_config(config, adapter.use_peft)
    start = where_stages_start(config, sft) if sft else Start(opd=where_to_start(config))
    prompts = load_prompts(arguments.dataset_name, arguments.dataset_config, arguments.dataset_train_split)
    prompts, held_out = hold_out(prompts, arguments.num_eval_prompts, config.seed)

    def build(model: str, args: DraftOPDConfig) -> DraftOPDTrainer:
        return DraftOPDTrainer(
            model,
            arguments.teacher_model_name_or_path,
            args,
            train_dataset=prompts,
            eval_dataset=held_out,
            peft_config=adapter.peft_config(),
            quantization_config=quantization.quantization_config(),
        )

    model, known = arguments.model_name_or_path, {}
    called = _names(model, config.output_dir)
    if sft is not None:
        known = run_sft(lambda: build(arguments.model_name_or_path, sft), start)
        first = "start" if called[0] in ("SFT", "Draft-OPD") else called[0]
        model, called = sft.output_dir, ("SFT", "Draft-OPD")
    trainer = build(model, config)
    result: dict[str, Any] = {"output_dir": config.output_dir}
    result["train"] = run_stage(trainer, start.opd, known.get("last"))
    if held_out is not None:
        earlier = (first, known["before"]) if "before" in known else None
        result |= results_of(trainer.measured, "eval", called, trainer.law, earlier)
        result |= {"serving": trainer.serving} if trainer.serving else {}
        result["traces"] = _write_traces(trainer, model, called)
        if trainer.is_world_process_zero():
            write_results(result, Path(config.output_dir))
    result["serve"] = _serve_commands(trainer, arguments.teacher_model_name_or_path, adapter.use_peft)
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    return result


def _names(start: str, output: str) -> tuple[str, str]:
    """What a table calls the drafter that was given and the one that was trained."""
    given, trained = Path(start).absolute().name, Path(output).absolute().name
    return ("start" if given == trained else given), trained


def _write_traces(trainer: DraftOPDTrainer, start: str, called: tuple[str, str]) -> str:
    """A page of held-out texts, as the drafter the run began from and the trained one speed them up; its path."""
    from ..core.records import Rollout
    from ..evaluation.viewer import write_trace_page
    from ..folders.checkpoints import load_drafter

    args, target = trainer.args, trainer.target
    completions = trainer.measured.last["eval"].report.completions[:TRACED]
    prompts = list(trainer.eval_dataset["prompt_ids"])[: len(completions)]
    texts = Rollout.from_ids(prompts, completions, device=target.device)
    drafters = {called[1]: trainer.drafter}
    if Path(start).resolve() != Path(args.output_dir).resolve():  # where the start has been written over
        before = load_drafter(start, **(args.model_init_kwargs or {}))
        drafters = {called[0]: before.to(target.device).bind(target).eval(), **drafters}
    traces = {name: trainer.traces_of(drafter, texts) for name, drafter in drafters.items()}
    file = Path(args.output_dir) / "trace.html"
    if trainer.is_world_process_zero():
        write_trace_page(file, traces, f"{target.name}, {trainer.law}")
    return str(file)


def _serve_commands(trainer: DraftOPDTrainer, target: str, adapted: bool) -> dict[str, str]:
    """What starts each engine that serves the drafter; an adapter is written whole first."""
    from ..folders.serving import launch_commands, serving_faults

    folder = trainer.args.output_dir
    whole = f"{folder}-whole" if adapted else folder
    faults = serving_faults(trainer.drafter, trainer.target.config.model_type)
    refusing = {engine for _, engine, served in faults if served is False}
    commands = launch_commands(trainer.drafter, target, whole)
    return {engine: command for engine, command in commands.items() if engine not in refusing}


def show(result: dict[str, Any]) -> str:
    lines = [f"drafter written to {result['output_dir']}"]
    if "table" in result:
        lines += ["", f"{result['prompts']} held-out prompts, {result['law']}", "", result["table"]]
        for name, gain in result.get("gains", {}).items():
            lines.append(f"{name}: {gain['mean']:+.3f} τ [{gain['low']:+.3f}, {gain['high']:+.3f}]")
        if "serving" in result:
            lines += ["", f"to serve with: {advised(result['serving'])}"]
        if result["before"] is None:
            lines += ["", "Not measured before training on these prompts, so there is no change to tell."]
        lines += ["", f"{TRACED} of their texts, block by block: {result['traces']}"]
    for engine, command in result["serve"].items():
        lines += ["", f"to serve it with {engine}:", "", command]
    return "\n".join(lines)
