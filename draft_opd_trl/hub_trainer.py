"""The side of a trainer that faces the Hub: its card, its pushes. Knows nothing of rollouts, batches and losses."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, upload_folder
from peft import PeftModel
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ._trl_compat import _BaseTrainer
from .callbacks import FirstEvaluationCallback
from .config import DraftOPDConfig
from .drafters.base import Drafter
from .hub import copy_checkpoint, merged, push_error, push_errors
from .model_card import CITATION, TAGS, TrainingRun, write_model_card
from .target import Target


logger = logging.get_logger(__name__)

_RECIPE = (
    "lmbda",
    "rollout_source",
    "temperature",
    "teacher_temperature",
    "accepted_loss",
    "accepted_weight",
    "rejected_loss",
    "rejected_weight",
    "num_anchors",
    "max_prompt_length",
    "max_completion_length",
    "chat_template_kwargs",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


class HubTrainer(_BaseTrainer):
    """
    A Trainer whose pushes are drafter folders that engines load by id.

    The Trainer's own push takes whatever lies in `output_dir`: pickled arguments with the token in them, logs named
    after the machine, tokenizer files, and adapters, which no engine loads.
    """

    _tag_names = list(TAGS)
    _name = "Draft-OPD"
    _paper = {"title": "Draft-OPD", "id": "2605.29343", "citation": CITATION}
    args: DraftOPDConfig
    drafter: Drafter
    target: Target
    target_revision: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(FirstEvaluationCallback())

    @property
    def _repo(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def create_model_card(self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None):
        """Write `README.md` into `output_dir`, from this project's own template."""
        if not self.is_world_process_zero():
            return
        args, state = self.args, self.state
        settings = args.to_dict()
        best = args.load_best_model_at_end and not self.is_in_train and state.best_global_step
        write_model_card(
            Path(args.output_dir) / "README.md",
            self._repo,
            self.drafter,
            self.target.name,
            self.target_revision,
            [*TAGS, *([tags] if isinstance(tags, str) else tags or [])],
            TrainingRun(
                step=best or state.global_step,
                history=state.log_history,
                recipe={name: settings[name] for name in _RECIPE} | {"processes": args.world_size},
                law=f"temperature {args.temperature:g}{' with drawn proposals' if args.sample_proposals else ''}",
                tokens=state.num_input_tokens_seen,
                dataset_name=dataset_name,
            ),
        )

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
        with push_errors(self._repo, f"The drafter is saved in {self.args.output_dir}."):
            if self.hub_model_id is None:
                super().init_hf_repo(token, private)  # Not our own, which says that nothing is saved.
            self.create_model_card(**kwargs)
            self._finish_current_push()
            job = self._upload(commit_message, token or self.args.hub_token, revision or self.args.hub_revision)
            return job.result() if blocking else job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        job = self._upload(
            f"Training in progress, step {self.state.global_step}",
            self.args.hub_token,
            self.args.hub_revision,
            {name: checkpoint for strategy, name in names.items() if strategy == self.args.hub_strategy},
        )
        # Nobody asks this job how it went, and training goes on without it.
        job.add_done_callback(lambda job: self._warn(job.exception(), checkpoint))
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), job])

    def _warn(self, error: Exception | None, checkpoint: Path) -> None:
        if error is not None:
            logger.warning(str(push_error(self._repo, error, f"Training goes on; {checkpoint} has the weights.")))

    def _upload(
        self, message: str, token: str | None, revision: str | None, checkpoints: dict[str, Path] | None = None
    ) -> Future:
        """Push the drafter as it stands now, from a copy, so that nothing that is saved or deleted later shows."""
        stage = TemporaryDirectory(prefix="_push-", dir=self.args.output_dir)
        drafter = merged(self.model) if isinstance(self.model, PeftModel) else self.drafter
        drafter.save_pretrained(stage.name)
        shutil.copy(Path(self.args.output_dir) / "README.md", stage.name)
        for name, checkpoint in (checkpoints or {}).items():
            copy_checkpoint(checkpoint, Path(stage.name) / name)
        job = upload_folder(
            repo_id=self.hub_model_id,
            folder_path=stage.name,
            commit_message=message,
            token=token,
            revision=revision,
            run_as_future=True,
        )
        job.add_done_callback(lambda _: stage.cleanup())
        return job
