"""The side of a trainer that faces the Hub: its card, its pushes. Knows nothing of rollouts, batches and losses."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, run_as_future, upload_folder
from peft import PeftModel
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from .._trl_compat import _BaseTrainer
from ..core.target import Target
from ..drafters.base import Drafter
from ..folders.hub import copy_checkpoint, merged, push_errors
from ..folders.model_card import TAGS, TrainingRun, write_model_card
from .callbacks import FirstEvaluationCallback
from .config import DraftOPDConfig


logger = logging.get_logger(__name__)

# What of the settings a card says. Chosen by name, as others hold paths, addresses or tokens.
RECIPE = (
    "recipe lmbda lmbda_end anchors rollout_source regenerate_every steps_per_generation temperature top_k top_p "
    "sample_proposals max_prompt_length truncate_prompts max_completion_length chat_template_kwargs accepted_loss "
    "accepted_weight accepted_decay rejected_loss rejected_weight rejected_decay sft_decay dpace_alpha beta "
    "teacher_temperature loss_max_clamp log_prob_min_clamp num_anchors replay_buffer_size replay_ratio "
    "replay_by_loss state_store_dtype disable_dropout shuffle_dataset optim learning_rate lr_scheduler_type "
    "warmup_steps weight_decay seed per_device_train_batch_size gradient_accumulation_steps world_size"
).split()


class HubTrainer(_BaseTrainer):
    """
    A Trainer whose pushes are drafter folders that engines load by id.

    The Trainer's own push takes whatever lies in `output_dir`: pickled arguments with the token in them, logs named
    after the machine, tokenizer files, and adapters, which no engine loads.
    """

    args: DraftOPDConfig
    drafter: Drafter
    target: Target
    target_revision: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(FirstEvaluationCallback())
        self._overruled = _overruled(self.optimizer, self.lr_scheduler)
        self._saved: tuple[Path, int] | None = None

    @property
    def _repo(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @property
    def law(self) -> str:
        """How evaluation decodes, in words."""
        return f"temperature {self.args.temperature:g}{' with drawn proposals' if self.args.sample_proposals else ''}"

    @property
    def weights_step(self) -> int:
        """Optimizer steps that the drafter as it stands has seen: fewer than the run's where its best was loaded."""
        best = self.args.load_best_model_at_end and not self.is_in_train and self.state.best_global_step
        return best or self.state.global_step

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """[`~transformers.Trainer.train`]."""
        self._saved = None
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the drafter, and beside it the card of the run so far.

        Args:
            output_dir (`str`, *optional*): Folder; the run's own by default.
        """
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # which is a checkpoint, or a push that writes its card itself
            self._saved = Path(output_dir or self.args.output_dir), self.weights_step
            self.renew_card()

    def renew_card(self) -> None:
        """Render the card of the folder saved last anew, if these weights are the ones it holds."""
        if self._saved is not None and self._saved[1] == self.weights_step:
            self.create_model_card(folder=self._saved[0])

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: Any = None,
        folder: Path | None = None,
    ) -> None:
        """Write `README.md` into `folder`, by default `output_dir`, from this project's own template."""
        if self.is_world_process_zero():
            self._card = partial(self._write_card, model_name, dataset_name, tags)
            self._card(folder or Path(self.args.output_dir), self._adapter)

    @property
    def _adapter(self) -> str | None:
        """The adapter's method, where that is what `save_model` writes."""
        if not isinstance(self.model, PeftModel):
            return None
        return str(self.model.active_peft_config.peft_type.value)

    def _write_card(
        self, model_name: str | None, dataset_name: str | None, tags: Any, folder: Path, adapter: str | None
    ) -> None:
        args, state = self.args, self.state
        settings = {**args.to_dict(), "world_size": args.world_size, **self._overruled}
        write_model_card(
            folder / "README.md",
            model_name or self._repo,
            self.drafter,
            self.target.name,
            self.target_revision,
            [*TAGS, *([tags] if isinstance(tags, str) else tags or [])],
            TrainingRun(
                step=self.weights_step,
                history=state.log_history,
                recipe={name: settings[name] for name in RECIPE if settings[name] is not None},
                law=self.law,
                tokens=state.num_input_tokens_seen,
                dataset_name=dataset_name,
            ),
            adapter,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self._adapter:  # PEFT has written a card of its own, or its own fields into ours.
            card = getattr(self, "_card", partial(self._write_card, None, None, None))
            card(Path(output_dir or self.args.output_dir), self._adapter)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        with push_errors(self._repo):
            super().init_hf_repo(token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """
        Save to `output_dir`, then push the drafter and its card: weights, config and code, and nothing else.

        Args:
            commit_message, blocking, token, revision, private: As in [`~transformers.Trainer.push_to_hub`].
            kwargs: Passed to [`create_model_card`].

        Raises:
            `OSError`: The Hub refused, or was not reached. The drafter is saved all the same.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        kept = f"The drafter is saved in {self.args.output_dir}."
        if self.hub_model_id is None:
            with push_errors(self._repo, kept):
                super().init_hf_repo(token, private)  # Not our own, as something is saved by now.
        self.create_model_card(**kwargs)
        self._finish_current_push()
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        upload = partial(self._upload, self._stage(), commit_message, token, revision, kept)
        return upload() if blocking else run_as_future(upload)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        stage, checkpoint = self._stage(), Path(checkpoint_folder)
        if self.args.hub_strategy == HubStrategy.CHECKPOINT:
            copy_checkpoint(checkpoint, Path(stage.name) / "last-checkpoint")
        elif self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS:
            copy_checkpoint(checkpoint, Path(stage.name) / checkpoint.name)
        job = run_as_future(
            self._upload_or_warn,
            stage,
            f"Training in progress, step {self.state.global_step}",
            self.args.hub_token,
            self.args.hub_revision,
            f"Training goes on; the weights are in {checkpoint}.",
        )
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _stage(self) -> TemporaryDirectory:
        """The drafter as it stands now, and its card: a copy, so that what is saved or deleted later does not show."""
        stage = TemporaryDirectory(prefix="_push-", dir=self.args.output_dir)
        drafter = merged(self.model) if isinstance(self.model, PeftModel) else self.drafter
        drafter.save_pretrained(stage.name)
        self._card(Path(stage.name), None)
        return stage

    def _upload(
        self, stage: TemporaryDirectory, message: str | None, token: str | None, revision: str | None, kept: str
    ) -> CommitInfo:
        with stage as folder, push_errors(self._repo, kept):
            return upload_folder(
                repo_id=self.hub_model_id, folder_path=folder, commit_message=message, token=token, revision=revision
            )

    def _upload_or_warn(self, *args: Any) -> None:
        """For pushes whose outcome nobody asks for."""
        try:
            self._upload(*args)
        except OSError as error:
            logger.warning(str(error))


def _overruled(optimizer: torch.optim.Optimizer | None, scheduler: Any) -> dict[str, Any]:
    """What stands in a card for settings that an optimizer or scheduler given to the trainer overrules."""
    facts: dict[str, Any] = {}
    if optimizer is not None:
        rates = {group.get("initial_lr", group["lr"]) for group in optimizer.param_groups}
        decays = {group.get("weight_decay", 0.0) for group in optimizer.param_groups}
        facts["optim"] = type(optimizer).__name__
        facts["learning_rate"], facts["weight_decay"] = (", ".join(map(str, sorted(v))) for v in (rates, decays))
    if scheduler is not None:
        facts |= {"lr_scheduler_type": type(scheduler).__name__, "warmup_steps": None}
    return facts
