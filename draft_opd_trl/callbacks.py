"""What a run shows and remembers, through the Trainer's callbacks."""

from __future__ import annotations

from collections.abc import Callable

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class AcceptanceProgressCallback(ProgressCallback):
    """
    The Trainer's progress bar, with the acceptance length of the texts just replayed.

    Args:
        acceptance_length (`Callable`): Returns it, or `None` while there is none.
    """

    def __init__(self, acceptance_length: Callable[[], float | None]) -> None:
        super().__init__()
        self.acceptance_length = acceptance_length

    def on_step_end(self, args, state, control, **kwargs):
        tau = self.acceptance_length()
        if self.training_bar is not None and tau is not None:
            self.training_bar.set_postfix_str(f"τ {tau:.2f}", refresh=False)
        super().on_step_end(args, state, control, **kwargs)


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
