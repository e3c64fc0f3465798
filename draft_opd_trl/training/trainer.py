"""`DraftOPDTrainer`: TRL's flow around rollouts, replay batches and the two-stream loss.

Knows no masks, no tensor maths and no drafter names.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .._trl_compat import _ForwardRedirection, disable_dropout_in_model, identity
from ..core.errors import InputError
from ..core.records import ReplayBatch, Rollout
from ..core.target import Target, stop_token_ids
from ..decoding.speculation import SpeculationSettings
from ..drafters.base import Drafter
from ..evaluation.traces import Trace, trace_texts
from ..folders.adapters import check_reach
from ..folders.checkpoints import load_drafter
from ..folders.model_card import cached_revision
from ..texts.prompts import check_fit, warn_of_open_ends
from ..texts.server_source import SERVED
from ..texts.sources import RolloutSource
from .batching import BatchMaker
from .callbacks import (
    AcceptanceProgressCallback,
    FiniteWeightsCallback,
    TraceCallback,
    UpdateSizeCallback,
    not_finite,
    open_in_run_folder,
)
from .config import DraftOPDConfig
from .error_buffer import ErrorBuffer
from .evaluating_trainer import EvaluatingTrainer
from .feed import BatchFeed, EpochSampler
from .loading import (
    add_adapter,
    check_dataset_size,
    check_run,
    check_texts,
    choose_pad_token,
    generation_batch_size,
    load_target,
    load_tokenizer,
    tokenize,
    warn_about_quantization,
    warn_about_serving,
)
from .losses import draft_loss
from .optim import MUON, MuonWithAdamW, optimizer_of
from .planning import announce_plan
from .reloading import ReloadCallback
from .replay_counts import Counts, count_texts
from .resuming import ResumingTrainer
from .rollout import build_source, state_store
from .run_log import RunLog
from .sharding import check_parallelism, shard


class DraftOPDTrainer(ResumingTrainer, EvaluatingTrainer):
    """
    Trainer for Draft-OPD (arXiv 2605.29343): on-policy distillation of a speculative-decoding drafter.

    Args:
        model (`str` or [`Drafter`]):
            The drafter to train: a path, an id, or an instance.
        teacher_model (`str` or [`~transformers.PreTrainedModel`]):
            The target: a path, an id, or an instance. Frozen, in eval mode, in its own dtype, outside the drafter.
        args ([`DraftOPDConfig`], *optional*):
            Configuration.
        train_dataset ([`~datasets.Dataset`], *optional*):
            Prompts: a `prompt` column, plain or conversational, or `prompt_ids`. With `rollout_source="dataset"`
            also `completion` or `completion_ids`. Or whole conversations in `messages`. Needed to train, not to
            evaluate.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts that [`evaluate`] decodes.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The target's tokenizer; loaded beside the target by default.
        callbacks, optimizers:
            As in [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter put on the drafter; `task_type` must be `None`. [`load_drafter`] reads the folder it is saved to
            as the drafter with the adapter merged in.
        quantization_config (*optional*):
            Passed to the target's `from_pretrained`.

    Raises:
        `ValueError`: Drafter and target do not fit, the data set is empty, too small or lacks columns, a prompt is
            too long, or settings contradict each other; before anything expensive.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | Drafter,
        teacher_model: str | PreTrainedModel,
        args: DraftOPDConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or model.kind
            args = DraftOPDConfig(f"{Path(name).name}-OPD")
        check_run(args, eval_dataset is not None)
        set_seed(args.seed)
        # Data first: what is wrong with it must show before models are loaded.
        tokenizer = load_tokenizer(teacher_model, args, processing_class)
        self._tokenize = partial(tokenize, tokenizer, args)
        if train_dataset is not None:
            train_dataset = self._tokenize(train_dataset, "train_dataset", args.rollout_source == "dataset")
            check_dataset_size(train_dataset, args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {key: self._tokenize(part, f"eval_dataset[{key!r}]") for key, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._tokenize(eval_dataset, "eval_dataset")
        drafter = load_drafter(model, **(args.model_init_kwargs or {})) if isinstance(model, str) else model
        teacher = load_target(teacher_model, args, quantization_config)
        self.target = Target(teacher)
        warn_about_quantization(self.target)
        if isinstance(teacher_model, str):
            revision = (args.teacher_model_init_kwargs or {}).get("revision")
            self.target_revision = cached_revision(teacher_model, revision)
        self.drafter: Drafter = drafter.bind(self.target)
        warn_about_serving(self.drafter, self.target)
        self.stop_token_ids = stop_token_ids(teacher, tokenizer)
        self._check_fit(train_dataset, eval_dataset, args)
        self._pad_token_id = choose_pad_token(teacher, tokenizer, self.stop_token_ids)
        model = drafter
        if peft_config is not None:
            model = add_adapter(drafter, peft_config, (args.model_init_kwargs or {}).get("revision"))
        if args.disable_dropout:
            disable_dropout_in_model(model)

        super().__init__(
            model=model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._optimizer_class = None if optimizers[0] is None else type(optimizers[0])
        self._forward_redirection = _ForwardRedirection()
        self._place_models()
        if peft_config is not None:
            with self._drafter_as_served():
                check_reach(self.model, drafter)
        self._set_up_callbacks()
        self._prepare_rooms()
        if train_dataset is not None and args.rollout_source == "dataset":
            check_texts(train_dataset, args.num_texts_to_check, self.source, self.target, args.sampling)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: DraftOPDConfig, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """What `args.optim` names."""
        return optimizer_of(args, model)

    def _place_models(self) -> None:
        """The drafter is placed by the Trainer, unless both are sharded."""
        kind = self._optimizer_class or (MuonWithAdamW if self.args.optim == MUON else None)
        check_parallelism(self.accelerator, kind is MuonWithAdamW)
        if self.is_fsdp_enabled:
            shard(self.target, self.model, self.accelerator)
        if not getattr(self.target.model, "hf_device_map", None):
            self.target.to(self.accelerator.device)

    def _set_up_callbacks(self) -> None:
        args, others = self.args, self.callback_handler.callbacks
        if self.pop_callback(ProgressCallback) is not None:
            shown = (lambda: self.last_acceptance_length, lambda: self.last_served_length)
            self.add_callback(AcceptanceProgressCallback(*shown))
        self.remove_callback(PrinterCallback)
        self.add_callback(TraceCallback(self.example_traces, others))
        self.add_callback(FiniteWeightsCallback())
        self.add_callback(UpdateSizeCallback())
        if args.server_reload_steps:
            self.add_callback(ReloadCallback(self.save_served, args))
        # A loss that is not finite ends the run; the filter would wait for the device at every micro-step to hide it.
        args.logging_nan_inf_filter = False
        open_in_run_folder(others, args)

    def _prepare_rooms(self) -> None:
        args = self.args
        self.error_buffer = ErrorBuffer(args.replay_buffer_size, by_loss=args.replay_by_loss)
        self.run_log = RunLog(self.accelerator)
        self._measure = self.run_log.stopwatch.measure
        batch_maker = BatchMaker(
            self.target,
            self.drafter,
            args.streams,
            args.on_policy,
            args.seed,
            buffer=self.error_buffer if args.replay_buffer_size else None,
            proposals=args.sampling if args.sample_proposals else None,
            store=state_store(args, self.target, self.drafter),
            autocast=self.accelerator.autocast,
            stopwatch=self.run_log.stopwatch,
        )
        self.feed = BatchFeed(
            self._write_texts,
            batch_maker,
            self.accelerator,
            batch_size=args.per_device_train_batch_size,
            steps_per_generation=args.steps_per_generation,
            accumulation_steps=args.gradient_accumulation_steps,
        )
        set_seed(args.seed, device_specific=True)
        self.last_acceptance_length = self.last_served_length = None

    # -- data ---------------------------------------------------------------------------------------------------

    def _check_fit(
        self, train: Dataset | None, evaluation: Dataset | dict[str, Dataset] | None, args: DraftOPDConfig
    ) -> None:
        """Tokenised texts must fit the target, and its own texts must end as it ends them."""
        parts = evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
        given = {name: part for name, part in {"train_dataset": train, **parts}.items() if part is not None}
        sizes = (self.target.vocab_size, self.target.context_length, args.max_completion_length)
        check_fit(given, *sizes, self.drafter.num_draft_tokens)
        if train is not None and args.rollout_source == "dataset":
            warn_of_open_ends(train, self.stop_token_ids, args.max_completion_length, "train_dataset")

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = ["prompt_ids", "completion_ids"]

    def get_train_dataloader(self) -> DataLoader:
        """Each batch holds the prompts of `steps_per_generation` micro-steps (as in TRL's DistillationTrainer)."""
        if self.train_dataset is None:
            raise InputError("`train()` needs a `train_dataset` of prompts.")
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.steps_per_generation,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=1,
            batch_size=generation_batch_size(self.args),
            repeat_count=self.args.steps_per_generation,
            shuffle=self.args.shuffle_dataset,
            seed=self.args.seed,
        )

    def speculation_settings(self, keep_states: bool = False) -> SpeculationSettings:
        """The law and lengths that rollouts and evaluation share."""
        args = self.args
        return SpeculationSettings(
            max_new_tokens=args.max_completion_length,
            stop_token_ids=self.stop_token_ids,
            sampling=args.sampling,
            sample_proposals=args.sample_proposals,
            batch_size=args.rollout_batch_size,
            keep_states=keep_states,
            pad_token_id=self._pad_token_id,
        )

    @cached_property
    def source(self) -> RolloutSource:
        """Where texts to train on come from."""
        args = self.args
        reads_states = args.streams.scores_rejected and args.any_on_policy and args.anchors == "exposed"
        return build_source(
            args,
            self.target,
            self.drafter,
            self.processing_class,
            self.speculation_settings(keep_states=reads_states),
            self.run_log.add,
            progress=self.accelerator.is_main_process and not args.disable_tqdm,
        )

    def _prepare_inputs(self, generation_batch: list[dict]) -> ReplayBatch:
        step, steps = self.state.global_step, self.state.max_steps
        # No autocast around it: the target runs in its own dtype.
        with self._measure("prepare"), self._drafter_as_served():
            batch, counts = self.feed.next(generation_batch, step, self.args.lmbda_at(step, steps))
        self._log_counts(counts)
        if counts and self.args.replay_buffer_size:
            self.run_log.add("replay/buffer", len(self.error_buffer))
        return batch

    def _write_texts(self, rows: list[dict]) -> Rollout:
        draw = 0 if self.args.sampling.greedy else int(self.state.epoch) // self.args.regenerate_every
        with self._measure("rollout"), self.target.uneven_forwards():
            rollout = self.source.write(rows, draw)
        self._log_counts(count_texts(rollout, self.stop_token_ids))
        return rollout

    def _before_training(self) -> None:
        """Say how much memory a step will take."""
        if self.train_dataset is None or not self.accelerator.is_main_process:
            return
        announce_plan(
            self.target.model.config,
            self.drafter.config,
            self.args,
            self.accelerator.device,
            prompt_length=max(map(len, self.train_dataset["prompt_ids"])),
            drafter_dtype=self.drafter.dtype,
            make_optimizer=self._optimizer_class,
            peft_config=self.model.active_peft_config if isinstance(self.model, PeftModel) else None,
        )

    # -- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs: ReplayBatch, return_outputs: bool = False, num_items_in_batch: Any = None):
        """Two-stream loss over the global denominator; `num_items_in_batch` of the Trainer is not used."""
        unwrapped = self.accelerator.unwrap_model(model)
        with self._measure("forward"):
            parts = self._forward_redirection(model, unwrapped, self._compute_loss, unwrapped, inputs)
        # The denominator is the whole step's, on every micro-step.
        weight = inputs.denominator / self.args.gradient_accumulation_steps
        self.run_log.add("loss/accepted", parts["accepted_loss"], weight)
        if inputs.draft_states is not None:
            self.run_log.add("loss/rejected", parts["rejected_loss"], weight)
        for name, value in parts["auxiliary"].items():
            self.run_log.add(f"auxiliary/{name}", value, weight)
        if self.args.replay_by_loss:
            self.error_buffer.note(inputs.tokens, inputs.lengths, inputs.blocks, parts["block_losses"])
        return (parts["loss"], None) if return_outputs else parts["loss"]

    def _compute_loss(self, model: Drafter | PeftModel, inputs: ReplayBatch) -> dict[str, torch.Tensor]:
        drafter = model.get_base_model() if isinstance(model, PeftModel) else model
        # Through TRL's forward redirection the model's own autocast wrapper is skipped, so it is entered here.
        with self.accelerator.autocast():
            return draft_loss(drafter, self.target, inputs, self.args.losses)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._measure("step"):
            output = super().training_step(model, inputs, num_items_in_batch)
        if self.feed.micro_steps % self.args.gradient_accumulation_steps == 0:
            self._end_step()
        return output

    def _end_step(self) -> None:
        """Before the optimizer moves: what the step's gradients come from, over all ranks."""
        totals = self.run_log.end_step()
        self.state.num_input_tokens_seen += int(totals.get("num_tokens", (0, 0))[0])
        if "acceptance/length" in totals:
            committed, verifications = totals["acceptance/length"]
            self.last_acceptance_length = committed / verifications
        if SERVED in totals:
            self.last_served_length = totals[SERVED][0] / totals[SERVED][1]
        for name in ("loss/accepted", "loss/rejected"):
            if name in totals and not math.isfinite(totals[name][0]):
                raise not_finite(f"{name} is {totals[name][0]}", self.state.global_step + 1, self.args)

    # -- logging ----------------------------------------------------------------------------------------------------

    def _log_counts(self, counts: Counts) -> None:
        for name, count in counts.items():
            self.run_log.add(name, *count)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Beside the loss of a logging window, or at the end of training, all that was counted in the window."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self.window_figures("loss" in logs))
        super().log(logs, start_time)

    def window_figures(self, with_loss: bool = True) -> dict[str, float]:
        """What the steps since the last call came to, by name (see the documentation's list of metrics)."""
        figures = self.run_log.take()
        if figures:
            figures["num_tokens"] = self.state.num_input_tokens_seen
        streams = [figures[name] for name in ("loss/accepted", "loss/rejected") if name in figures]
        # The Trainer's own is a mean over steps whose denominators differ.
        return {**figures, "loss": sum(streams)} if streams and with_loss else figures

    def example_traces(self) -> list[Trace]:
        """A few of the texts in use, as this drafter would speed them up now by its argmax."""
        if not self.feed.rollouts:
            return []
        return self.traces_of(self.drafter, self.feed.rollouts[0].part(0, self.args.num_completions_to_print))

    def traces_of(self, drafter: Drafter, texts: Rollout) -> list[Trace]:
        """Texts as a drafter that is bound to this target speeds them up; all ranks take part where it is sharded."""
        with self._drafter_as_served(), self.target.uneven_forwards():
            return trace_texts(self.target, drafter, texts, self.processing_class, self.args.sampling)
