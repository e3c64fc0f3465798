"""The side of a trainer that measures: real speculative decoding by all ranks, before training and after.

Knows no losses, no rollouts and no batches.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel

from ..core.errors import InputError
from ..core.files import atomic_folder
from ..decoding.acceptance import AcceptanceReport, join_reports
from ..decoding.speculation import SpeculationSettings
from ..drafters.base import in_eval_mode
from ..evaluation.before_after import BeforeAfter
from ..evaluation.best_k import advice
from ..evaluation.by_replay import measure_by_replay
from ..evaluation.measure import measure_acceptance, text_seeds
from ..evaluation.round_costs import check_timed, serving_choices
from ..folders.hub import merged
from .hub_trainer import HubTrainer
from .sharding import gathered


class EvaluatingTrainer(HubTrainer):
    """
    A Trainer whose evaluation is speculative decoding, and that remembers what it said before training.

    Attributes:
        measured ([`BeforeAfter`]): The reports, texts included, of the evaluations before the first step and last.
        serving (`list[dict]`): What the last one says of how many proposals to serve with, as [`advice`] writes it.
    """

    _tokenize: Callable[[Dataset, str], Dataset]
    _check_fit: Callable[..., None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_timed(self.target, self.args.serve_batch_sizes)
        self.measured = BeforeAfter()
        self.serving: list[dict[str, Any]] = []

    @abstractmethod
    def speculation_settings(self) -> SpeculationSettings:
        """The law and lengths that texts are decoded under."""

    @contextmanager
    def _drafter_as_served(self) -> Iterator[None]:
        """Eval mode and whole weights, on all ranks at once."""
        with in_eval_mode(self.model), gathered(self.model):
            yield

    def save_served(self, folder: Path) -> None:
        """The drafter as it stands, adapters in its weights, in place of what `folder` holds; by all ranks at once."""
        with self._drafter_as_served():
            if self.is_world_process_zero():
                drafter = merged(self.model) if isinstance(self.model, PeftModel) else self.drafter
                with atomic_folder(folder) as part:
                    drafter.save_pretrained(part)
                    shutil.rmtree(folder, ignore_errors=True)

    def measure(self, eval_dataset: Dataset | None = None, progress: str | None = None) -> AcceptanceReport:
        """`eval_dataset` (tokenised, see `prompt_ids`), decoded speculatively by all ranks together (where the
        target would read every text anew at each round, by replay); on every rank.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        prompts = list(dataset["prompt_ids"])
        share, seeds = prompts[rank::world], text_seeds(self.args.seed, range(len(prompts)))[rank::world]
        reports = []
        with self._drafter_as_served(), self.target.uneven_forwards():
            if share:
                settings = self.speculation_settings()
                measure = measure_acceptance if self.target.reads_anew is None else measure_by_replay
                reports.append(measure(self.target, self.drafter, share, settings, progress=progress, seeds=seeds))
        dealt = [text for first in range(world) for text in range(first, len(prompts), world)]
        order = sorted(range(len(dealt)), key=dealt.__getitem__)
        return join_reports(gather_object(reports), at_once=True).select(order)

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
            `eval_blocks_fully_accepted`, `eval_stops_in_blocks`, times and throughput. Where the same prompts were
            evaluated before the first step, also `eval_acceptance_length_change` with `_low` and `_high`: the
            difference of τ, paired by prompt. Outside of training, for each of `serve_batch_sizes`,
            `eval_serve_batch_<size>_num_draft_tokens` and `_speedup`: the K to serve with, 0 for no drafter, and its
            speed over plain decoding.

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
        return self.note_evaluation(dataset, report, metric_key_prefix)

    def note_evaluation(
        self, dataset: Dataset, report: AcceptanceReport, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """
        Log, remember and card what was measured of the drafter as it stands; see [`evaluate`].

        Args:
            dataset ([`~datasets.Dataset`]): Tokenised prompts.
            report ([`AcceptanceReport`]): What came of them, here or in an earlier stage that ended with this drafter.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Prefix of the metrics.
        """
        self.measured.note(metric_key_prefix, dataset["prompt_ids"], report, self.weights_step)
        metrics = report.metrics(metric_key_prefix)
        change = self.measured.change(metric_key_prefix)
        if change is not None:
            ends = {"": "mean", "_low": "low", "_high": "high"}
            tau = f"{metric_key_prefix}_acceptance_length_change"
            metrics |= {tau + end: change[key] for end, key in ends.items()}
        if self.args.serve_batch_sizes and not self.is_in_train:
            self.serving = self._time_rounds(dataset, report)
            for one in self.serving:
                told = f"{metric_key_prefix}_serve_batch_{one['batch_size']}"
                metrics |= {f"{told}_{name}": one[name] for name in ("num_draft_tokens", "speedup")}
        self.log(metrics)
        self.state.log_history[-1]["step"] = self.weights_step
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.renew_card()
        return metrics

    def _time_rounds(self, dataset: Dataset, report: AcceptanceReport) -> list[dict[str, Any]]:
        """[`advice`] for `serve_batch_sizes`, as the first rank timed it; on every rank."""
        law, sizes = self.speculation_settings(), self.args.serve_batch_sizes
        prompts, by_slot = list(dataset["prompt_ids"]), report.acceptance_by_slot
        with self._drafter_as_served(), self.target.uneven_forwards():
            told = serving_choices(self.target, self.drafter, prompts, law, by_slot, sizes)
        return gather_object([advice(told)])[0]
