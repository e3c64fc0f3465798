"""`DraftOPDTrainer`: TRL's flow around rollouts, replay batches and the two-stream loss.

Knows no masks, no tensor maths and no drafter names.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ._trl_compat import (
    _ForwardRedirection,
    disable_dropout_in_model,
    identity,
)
from .acceptance import AcceptanceReport, join_reports
from .batching import BatchMaker, ReplayMetrics, StreamSettings
from .callbacks import AcceptanceProgressCallback, TraceCallback
from .checkpoints import load_drafter
from .config import DraftOPDConfig
from .drafters.base import Drafter, in_eval_mode
from .errors import InputError, NotFoundError
from .evaluation import measure_acceptance, text_seeds
from .feed import BatchFeed, EpochSampler
from .hub import check_hub_access
from .hub_trainer import HubTrainer
from .loading import (
    add_adapter,
    check_dataset_size,
    check_texts,
    choose_pad_token,
    generation_batch_size,
    load_target,
    load_tokenizer,
    warn_about_quantization,
)
from .losses import Heads, LossSettings, batch_loss
from .model_card import cached_revision
from .planning import announce_plan
from .prompts import check_fit, tokenize_dataset, warn_of_open_ends
from .records import ReplayBatch, Rollout
from .replay import ErrorBuffer
from .rollout import RolloutSource, build_source
from .sampling import SamplingParams
from .sharding import check_parallelism, gathered, shard
from .speculation import SpeculationSettings
from .target import Target, stop_token_ids
from .traces import Trace, trace_texts


class DraftOPDTrainer(HubTrainer):
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
        if args.push_to_hub:
            check_hub_access(args.hub_token)
        set_seed(args.seed)
        # Data first: what is wrong with it must show before models are loaded.
        tokenizer = load_tokenizer(teacher_model, args, processing_class)
        self._tokenize = partial(_tokenize, tokenizer, args)
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
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs are visible to one process, and nn.DataParallel cannot drive a drafter bound to "
                "one target. Launch with `accelerate launch`, or make one GPU visible."
            )
        self._optimizer_class = None if optimizers[0] is None else type(optimizers[0])
        self._place_models()
        self._forward_redirection = _ForwardRedirection()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(AcceptanceProgressCallback(lambda: self.last_acceptance_length))
        self.remove_callback(PrinterCallback)
        self.add_callback(TraceCallback(self.example_traces, self.callback_handler.callbacks))
        self._prepare_rooms()
        if train_dataset is not None and args.rollout_source == "dataset":
            sampling = self.speculation_settings().sampling
            check_texts(train_dataset, args.num_texts_to_check, self.source, self.target, sampling)

    def _place_models(self) -> None:
        """The drafter is placed by the Trainer, unless both are sharded."""
        check_parallelism(self.accelerator)
        if self.is_fsdp_enabled:
            shard(self.target, self.model, self.accelerator)
        if not getattr(self.target.model, "hf_device_map", None):
            self.target.to(self.accelerator.device)

    @contextmanager
    def _drafter_as_served(self) -> Iterator[None]:
        """Eval mode and whole weights, on all ranks at once."""
        with in_eval_mode(self.model), gathered(self.model):
            yield

    def _prepare_rooms(self) -> None:
        args, drafter = self.args, self.drafter
        loss = {"beta": args.beta, "max_clamp": args.loss_max_clamp, "log_prob_min_clamp": args.log_prob_min_clamp}
        self.accepted_loss = LossSettings(args.accepted_loss, args.teacher_temperature, **loss)
        self.rejected_loss = LossSettings(args.rejected_loss, args.teacher_temperature, **loss)
        self.error_buffer = ErrorBuffer(args.replay_buffer_size, args.replay_by_loss)
        streams = StreamSettings(
            args.accepted_weight,
            args.rejected_weight,
            args.rejected_decay,
            args.accepted_decay,
            drafter.sft_decay if args.sft_decay is None else args.sft_decay,
            args.whole_blocks,
        )
        batch_maker = BatchMaker(
            self.target,
            drafter,
            streams,
            args.lmbda,
            args.num_anchors,
            args.num_chains,
            args.seed,
            self.error_buffer if args.replay_buffer_size else None,
            args.replay_ratio,
            self.speculation_settings().sampling if args.sample_proposals else None,
            args.anchors,
        )
        self.feed = BatchFeed(
            self._write_texts,
            batch_maker,
            self.accelerator,
            args.per_device_train_batch_size,
            args.steps_per_generation,
            args.gradient_accumulation_steps,
        )
        set_seed(args.seed, device_specific=True)
        self._metrics: dict[str, list[float | torch.Tensor]] = defaultdict(list)
        self._seconds: dict[str, float] = defaultdict(float)
        self.last_acceptance_length: float | None = None

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
            sampling=SamplingParams(args.temperature, args.top_k, args.top_p),
            sample_proposals=args.sample_proposals,
            batch_size=args.rollout_batch_size,
            keep_states=keep_states,
            pad_token_id=self._pad_token_id,
        )

    @cached_property
    def source(self) -> RolloutSource:
        """Where texts to train on come from."""
        args = self.args
        on_policy = args.lmbda > 0 or args.lmbda_end
        return build_source(
            args,
            self.target,
            self.drafter,
            self.processing_class,
            self.speculation_settings(keep_states=args.rejected_weight > 0 and on_policy),
            lambda name, value: self._metrics[name].append(value),
            progress=self.accelerator.is_main_process and not args.disable_tqdm,
        )

    def _prepare_inputs(self, generation_batch: list[dict]) -> ReplayBatch:
        start = time.perf_counter()
        if self.args.lmbda_end is not None:
            done = self.state.global_step / max(self.state.max_steps - 1, 1)
            self.feed.make_batches.lmbda = self.args.lmbda + done * (self.args.lmbda_end - self.args.lmbda)
        # No autocast: the target runs in its own dtype, and proposals are those speculation would make.
        with self._drafter_as_served():
            batch, met = self.feed.next(generation_batch, self.state.global_step)
        if met is not None:
            self._log_replay(met)
        self._seconds["prepare"] += time.perf_counter() - start
        return batch

    def _write_texts(self, rows: list[dict]) -> Rollout:
        start = time.perf_counter()
        draw = int(self.state.epoch) // self.args.regenerate_every if self.args.temperature > 0 else 0
        with self.target.uneven_forwards():
            rollout = self.source.write(rows, draw)
        self._metrics["time/rollout"].append(time.perf_counter() - start)
        lengths = self.accelerator.gather(rollout.completion_lengths).float()
        self.state.num_input_tokens_seen += int(self.accelerator.gather(rollout.lengths).sum())
        self._metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        for name in ("mean", "min", "max"):
            self._metrics[f"completions/{name}_length"].append(getattr(lengths, name)().item())
        ends = rollout.tokens.gather(1, rollout.lengths[:, None] - 1)
        clipped = ~torch.isin(ends, torch.tensor(self.stop_token_ids, device=ends.device))
        self._metrics["completions/clipped_ratio"].append(self.accelerator.gather(clipped).float().mean().item())
        return rollout

    def _log_replay(self, local: ReplayMetrics) -> None:
        counts = torch.tensor(local.counts(), device=self.accelerator.device, dtype=torch.long)
        totals = local.with_counts(self.accelerator.reduce(counts, "sum").tolist())
        if totals.verifications:
            self.last_acceptance_length = totals.committed / totals.verifications
        for name, value in totals.logs().items():
            self._metrics[name].append(value)
        if self.args.replay_buffer_size:
            self._metrics["replay/buffer"].append(len(self.error_buffer))

    def train(self, *args: Any, **kwargs: Any):
        """[`~transformers.Trainer.train`], once it has been said how much memory a step will take."""
        if self.train_dataset is not None and self.accelerator.is_main_process:
            self._announce_plan()
        return super().train(*args, **kwargs)

    def _announce_plan(self) -> None:
        args, drafter = self.args, self.drafter
        options: dict[str, Any] = {"drafter_dtype": drafter.dtype, "make_optimizer": self._optimizer_class}
        if args.bf16 or args.fp16:
            options["autocast"] = torch.bfloat16 if args.bf16 else torch.float16
        longest = max(map(len, self.train_dataset["prompt_ids"]))
        announce_plan(self.target.model.config, drafter.config, args, longest, self.accelerator.device, **options)

    # -- loss ---------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs: ReplayBatch, return_outputs: bool = False, num_items_in_batch: Any = None):
        """Two-stream loss over the global denominator; `num_items_in_batch` of the Trainer is not used."""
        start = time.perf_counter()
        unwrapped = self.accelerator.unwrap_model(model)
        parts = self._forward_redirection(model, unwrapped, self._compute_loss, unwrapped, inputs)
        for name in ("accepted_loss", "rejected_loss"):
            if name == "accepted_loss" or inputs.draft_states is not None:
                mean = self.accelerator.reduce(parts[name] / inputs.denominator.clamp(min=1e-8), "mean")
                self._metrics[f"loss/{name.removesuffix('_loss')}"].append(mean)
        if self.args.replay_by_loss:
            self.error_buffer.note(inputs.tokens, inputs.lengths, inputs.blocks, parts["block_losses"])
        self._seconds["forward"] += time.perf_counter() - start
        return (parts["loss"], None) if return_outputs else parts["loss"]

    def _compute_loss(self, model: Drafter | PeftModel, inputs: ReplayBatch) -> dict[str, torch.Tensor]:
        drafter = model.get_base_model() if isinstance(model, PeftModel) else model
        # Through TRL's forward redirection the model's own autocast wrapper is skipped, so it is entered here.
        with self.accelerator.autocast():
            hidden = drafter.replay(inputs.features, inputs.tokens, inputs.blocks)
            heads = Heads(drafter.output_weight(), self.target.logits, drafter.vocab_map, self.target.linear_head)
            return batch_loss(hidden, inputs, heads, self.accepted_loss, self.rejected_loss, self.args.loss_chunk_size)

    def training_step(self, model, inputs, num_items_in_batch=None):
        start = time.perf_counter()
        output = super().training_step(model, inputs, num_items_in_batch)
        self._seconds["step"] += time.perf_counter() - start
        if self.feed.micro_steps % self.args.gradient_accumulation_steps == 0:
            spent = self._seconds
            self._metrics["step_time"].append(spent["step"])
            self._metrics["time/forward"].append(spent["forward"])
            self._metrics["time/backward"].append(spent["step"] - spent["prepare"] - spent["forward"])
            self._seconds = defaultdict(float)
        return output

    # -- evaluation ---------------------------------------------------------------------------------------------

    def measure(self, eval_dataset: Dataset | None = None, progress: str | None = None) -> AcceptanceReport | None:
        """This rank's share of `eval_dataset` (tokenised, see `prompt_ids`), decoded speculatively; `None` of none."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = list(dataset["prompt_ids"])
        seeds = text_seeds(self.args.seed, range(len(prompts)))[rank::world]
        prompts = prompts[rank::world]
        with self._drafter_as_served(), self.target.uneven_forwards():
            if not prompts:
                return None
            return measure_acceptance(
                self.target, self.drafter, prompts, self.speculation_settings(), progress=progress, seeds=seeds
            )

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Acceptance length by real speculative decoding.

        Args:
            eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): Prompts; the trainer's own by default.
            ignore_keys: Unused; kept for the Trainer's signature.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metrics.

        Returns:
            `dict` of all of [`AcceptanceReport.metrics`]: `eval_acceptance_length` with `_low` and `_high` (95 % over
            prompts), `eval_acceptance_slot_<k>`, `eval_acceptance_length_from_<position>`,
            `eval_blocks_fully_accepted`, `eval_stops_in_blocks`, times and throughput.

        Raises:
            `ValueError`: There is no evaluation data set.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise InputError("`evaluate()` needs prompts: pass `eval_dataset` here or to the trainer.")
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for key, part in dataset.items():
                metrics.update(self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{key}"))
            return metrics
        if "prompt_ids" not in dataset.column_names:
            dataset = self._tokenize(dataset, "eval_dataset")
            self._check_fit(None, dataset, self.args)
        show = self.accelerator.is_main_process and not self.args.disable_tqdm
        report = self.measure(dataset, "Evaluating" if show else None)
        metrics = join_reports(gather_object([] if report is None else [report]), at_once=True).metrics(
            metric_key_prefix
        )
        with in_eval_mode(self.model):
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- logging and checkpoints ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            for name, values in self._metrics.items():
                finite = [value for value in map(float, values) if not math.isnan(value)]
                if finite:
                    logs[name] = sum(finite) / len(finite)
            self._metrics.clear()
        super().log(logs, start_time)

    def example_traces(self) -> list[Trace]:
        """A few of the texts in use, as this drafter would speed them up now by its argmax."""
        if not self.feed.rollouts:
            return []
        texts = self.feed.rollouts[0].rows(0, self.args.num_completions_to_print)
        sampling = self.speculation_settings().sampling
        with self._drafter_as_served(), self.target.uneven_forwards():
            return trace_texts(self.target, self.drafter, texts, self.processing_class, sampling)

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"draft_opd_state_{self.accelerator.process_index}.pt"

    def _save_checkpoint(self, model, trial) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        os.makedirs(folder, exist_ok=True)
        state = {
            "feed": self.feed.state_dict(),
            "error_buffer": self.error_buffer.state_dict(),
        }
        file = self._state_file(folder)
        torch.save(state, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
        self.create_model_card()
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        # Of all that the Trainer loads, this is what it loads under every backend.
        super()._load_optimizer_and_scheduler(checkpoint)
        file = self._state_file(checkpoint)
        if not file.is_file():
            raise NotFoundError(
                f"{file} is missing, so the run cannot continue as it was (texts in use, error buffer). "
                "Resume from another checkpoint, or start a new run from this drafter."
            )
        state = torch.load(file, weights_only=False)
        self.feed.load_state_dict(state["feed"])
        self.error_buffer.load_state_dict(state["error_buffer"])


def _tokenize(
    tokenizer: PreTrainedTokenizerBase,
    args: DraftOPDConfig,
    dataset: Dataset,
    name: str,
    needs_completions: bool = False,
) -> Dataset:
    return tokenize_dataset(
        dataset,
        tokenizer,
        args.max_prompt_length,
        args.chat_template_kwargs,
        needs_completions,
        args.truncate_prompts,
        name,
    )
