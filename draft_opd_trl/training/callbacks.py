"""What a run shows and remembers, through the Trainer's callbacks: the progress bar, traces, trackers."""

from __future__ import annotations

import importlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np
import torch
from accelerate.utils import reduce
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, rewrite_logs
from transformers.integrations.integration_utils import default_logdir
from transformers.trainer_callback import ProgressCallback

from ..core.errors import InputError
from ..evaluation.traces import Trace
from ..evaluation.viewer import marked_text, print_traces
from ..texts.server_source import SERVED


class AcceptanceProgressCallback(ProgressCallback):
    """
    The Trainer's progress bar, with the acceptance length of the texts just in use, and a line a log.

    A line has a few figures ([`log_line`]); the trackers in `report_to`, and the state, get all of them.

    Args:
        acceptance_length (`Callable`): Returns it, or `None` while there is none.
        served (`Callable`, *optional*): Returns that of the server that wrote texts last, or `None`.
    """

    def __init__(
        self, acceptance_length: Callable[[], float | None], served: Callable[[], float | None] = lambda: None
    ) -> None:
        super().__init__()
        self.figures = {"τ": acceptance_length, "served τ": served}

    def on_step_end(self, args, state, control, **kwargs):
        shown = {name: value for name, figure in self.figures.items() if (value := figure()) is not None}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix_str(", ".join(f"{name} {value:.2f}" for name, value in shown.items()), False)
        super().on_step_end(args, state, control, **kwargs)

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._last = state.global_step, state.num_input_tokens_seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        if "loss" in logs and "step_time" in logs:
            steps, tokens = (now - then for now, then in zip(_counts(state), self._last, strict=True))
            self._last = _counts(state)
            logs = {**logs, "tokens_per_second": tokens / max(steps * logs["step_time"], 1e-9)}
        line = log_line(logs)
        if line:
            self.training_bar.write(f"step {state.global_step}/{state.max_steps}: {line}")


def _counts(state: TrainerState) -> tuple[int, int]:
    return state.global_step, state.num_input_tokens_seen


# What a line of training shows, where it was logged: a name, and how its value is written.
TRAINING_FIGURES = {
    "loss": "loss {:.4g}",
    "acceptance/length": "τ {:.3f}",
    SERVED: "served τ {:.3f}",
    "acceptance/slot_1": "first proposal {:.1%}",
    "learning_rate": "lr {:.2e}",
    "step_time": "{:.2f} s/step",
    "tokens_per_second": "{:.0f} tokens/s",
}


def log_line(logs: Mapping[str, float]) -> str | None:
    """
    A log in a line for people: six figures of training, and a seventh where a server speculates; of an
    evaluation τ with its interval, and the change.

    Args:
        logs (`Mapping[str, float]`): As the Trainer has it.

    Returns:
        `None` for what says nothing new, such as the summary at the end of training.
    """
    if "loss" in logs:
        return ", ".join(style.format(logs[name]) for name, style in TRAINING_FIGURES.items() if name in logs)
    ends = ("", "_low", "_high")
    parts = []
    for name in (name for name in logs if name.endswith("_acceptance_length")):
        tau = "τ {:.3f} [{:.3f}, {:.3f}]".format(*(logs[name + end] for end in ends))
        if f"{name}_change" in logs:
            tau += ", change {:+.3f} [{:+.3f}, {:+.3f}]".format(*(logs[f"{name}_change{end}"] for end in ends))
        parts.append(f"{name.removesuffix('_acceptance_length')}: {tau}")
    return "; ".join(parts) or None


class FirstEvaluationCallback(TrainerCallback):
    """Puts an evaluation made before training into the run's history, which `train()` begins anew."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if state.global_step == 0:
            self.logs.append({**metrics, "step": 0})

    def on_train_begin(self, args, state, control, **kwargs):
        # The history of a resumed run may hold one.
        if not any(log["step"] == 0 for log in state.log_history):
            state.log_history[:0] = self.logs


def open_in_run_folder(callbacks: Sequence[TrainerCallback], args: TrainingArguments) -> None:
    """
    Have TensorBoard write where `train()` would, from the first log on.

    The Trainer's callback settles its folder when training begins, and what is logged before goes to `./runs`: an
    evaluation before training would be a run of its own there, and share no plot with the one after.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(args.output_dir, default_logdir())


def not_finite(what: str, step: int, args: TrainingArguments) -> InputError:
    """The error that ends a run whose numbers broke."""
    return InputError(
        f"{what} at step {step}, with learning_rate {args.learning_rate:g} and max_grad_norm {args.max_grad_norm:g}: "
        f"what follows would train nothing. Nothing of this step was saved; checkpoints in {args.output_dir} are from "
        "before. Start from one with a lower learning_rate, a longer warmup or a smaller max_grad_norm, and check "
        "that drafter and target are finite in their dtype."
    )


class FiniteWeightsCallback(TrainerCallback):
    """Ends a run at the step that made a weight NaN or infinite, before anything is logged, saved or decoded."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = [_own_share(weight) for weight in model.parameters() if weight.requires_grad]
        # The largest magnitude: it cannot overflow, and one number is fetched for all.
        largest = torch.nn.utils.get_total_norm([weight for weight in weights if weight.numel()], float("inf"))
        if not torch.isfinite(largest):
            raise not_finite("A weight of the drafter is not finite", state.global_step, args)


class UpdateSizeCallback(TrainerCallback):
    """
    Says once how far an update at the peak rate moves each of the optimizer's groups, as a share of its weights.

    Groups that learn ten times more slowly than the others are a trap that no other figure shows.
    """

    def __init__(self) -> None:
        self.before: list[list[torch.Tensor]] | None = None
        self.done = False

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # A warmup begins with a rate of 0. What is compared waits on the CPU, so the device holds no second copy.
        if not self.done and any(group["lr"] for group in optimizer.param_groups):
            self.before = [
                [_own_share(weight).to("cpu", copy=True) for weight in group["params"]]
                for group in optimizer.param_groups
            ]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.before is None:
            return
        sums = torch.zeros(len(self.before), 2, dtype=torch.float64)
        for row, group, weights in zip(sums, optimizer.param_groups, self.before, strict=True):
            for weight, old in zip(group["params"], weights, strict=True):
                new = _own_share(weight).cpu().double()
                row += torch.stack([(new - old.double()).square().sum(), new.square().sum()])
        self.before, self.done = None, True
        # Ranks hold shares of the weights, or all the same: the ratio of sums is right for both.
        sums = reduce(sums.float().to(args.device), "sum").cpu()
        moved = [
            f"{_described(group['params'])} by {row[0].div(row[1]).sqrt() * group.get('initial_lr', rate) / rate:.2%}"
            for row, group in zip(sums, optimizer.param_groups, strict=True)
            if (rate := group["lr"]) and row[0] > 0
        ]
        if moved and state.is_world_process_zero:
            tqdm.write(f"an update at the peak learning rate moves {', '.join(moved)} of their size")


def _own_share(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _described(weights: Sequence[torch.Tensor]) -> str:
    sort = "matrices" if all(weight.ndim == 2 for weight in weights) else "other tensors"
    return f"{len(weights)} {sort} ({sum(weight.numel() for weight in weights):,} weights)"


class TraceCallback(TrainerCallback):
    """
    Acceptance by slot as a histogram for the trackers in `report_to`, and with `log_completions` example texts as
    traces: printed, and as a table where the tracker has tables (TensorBoard gets them as text).

    Args:
        example_traces (`Callable`): Returns the traces; called on every rank, as a sharded target needs all of them.
        callbacks (`Sequence[TrainerCallback]`): The Trainer's, one of which may hold TensorBoard's writer.
    """

    def __init__(self, example_traces: Callable[[], list[Trace]], callbacks: Sequence[TrainerCallback]) -> None:
        self.example_traces, self.callbacks = example_traces, callbacks

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Evaluations and the end of training log too; texts are in use where a training step was logged.
        traces = self.example_traces() if args.log_completions and "loss" in logs else []
        if not state.is_world_process_zero:
            return
        if traces:
            # Bars are taken away meanwhile: a box that is printed beside one is torn.
            with tqdm.external_write_mode():
                print_traces({f"step {state.global_step}": traces})
        histograms = rewrite_logs(slot_shares(logs))
        for tracker in _trackers(args.report_to):
            record = {name: tracker.Histogram(np_histogram=histogram(shares)) for name, shares in histograms.items()}
            if traces:
                record["traces"] = tracker.Table(dataframe=trace_table(traces, state.global_step))
            if record:
                tracker.log({**record, "train/global_step": state.global_step})
        for writer in (one.tb_writer for one in self.callbacks if isinstance(one, TensorBoardCallback)):
            for name, shares in histograms.items():
                _add_histogram(writer, name, shares, state.global_step)
            for number, trace in enumerate(traces):
                # Indented, Markdown takes it as it stands.
                text = marked_text(trace).plain.replace("\n", "\n    ")
                title = f"τ {trace.acceptance_length:.2f}"
                writer.add_text(f"traces/{number}", f"{title}\n\n    {text}", state.global_step)
            writer.flush()


def _trackers(report_to: Sequence[str]) -> list[ModuleType]:
    """Modules with wandb's interface that a run reports to."""
    named = [importlib.import_module(name) for name in ("wandb", "trackio") if name in report_to]
    # As in TRL: wandb may be switched off, and then has no run.
    return [module for module in named if module.__name__ != "wandb" or module.run is not None]


def slot_shares(logs: dict[str, float]) -> dict[str, list[float]]:
    """`…slot_1`, `…slot_2`, … of a log as one list, named `…by_slot`."""
    shares: dict[str, list[float]] = defaultdict(list)
    for name, value in logs.items():
        found = re.fullmatch(r"(.*acceptance[/_])slot_\d+", name)
        if found:
            shares[f"{found[1]}by_slot"].append(value)
    return shares


def histogram(shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Heights and edges: bar k, around k, is the share of blocks whose first k proposals were accepted."""
    return np.array(shares), np.arange(len(shares) + 1) + 0.5


def _add_histogram(writer, name: str, shares: list[float], step: int) -> None:
    heights, edges = histogram(shares)
    slots = (edges[:-1] + edges[1:]) / 2
    writer.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=heights.sum(),
        sum=(heights * slots).sum(),
        sum_squares=(heights * slots**2).sum(),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=heights.tolist(),
        global_step=step,
    )


def trace_table(traces: list[Trace], step: int):
    """A `pandas.DataFrame`, as trackers take it, a text a line."""
    import pandas as pd

    return pd.DataFrame(
        {
            "step": [step] * len(traces),
            "prompt": [trace.prompt for trace in traces],
            "completion": [trace.completion for trace in traces],
            "acceptance_length": [trace.acceptance_length for trace in traces],
            "trace": [marked_text(trace).plain for trace in traces],
        }
    )
