"""What the Trainer's callbacks show of a run."""

from __future__ import annotations

from collections.abc import Callable

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
