"""The drafter as it stands, handed to the server that writes the texts: a folder, and a command of the user's.

So the server's own acceptance, which is logged beside ours, is that of the drafter in training. Its texts do not
depend on it. Knows no drafters, and not what the command does.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..core.endpoint import printable
from ..core.errors import InputError
from .resuming import on_first


FOLDER = "_served_drafter"


class ReloadCallback(TrainerCallback):
    """
    Every `server_reload_steps` steps, and when a run goes on, writes the drafter and runs `server_reload_command`.

    Args:
        save (`Callable`): Writes the drafter to a folder, in place of the one before; called on every rank.
        args ([`DraftOPDConfig`]): The two settings, and where the run is.

    Raises:
        `ValueError`: The command failed.
    """

    def __init__(self, save: Callable[[Path], None], args: Any) -> None:
        self.save = save
        self.folder = Path(args.output_dir).absolute() / FOLDER
        self.steps, self.timeout = args.server_reload_steps, args.server_timeout
        self.command = shlex.split(args.server_reload_command)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self._reload()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            self._reload()

    def _reload(self) -> None:
        self.save(self.folder)
        on_first(self._run)

    def _run(self) -> None:
        try:
            done = subprocess.run([*self.command, self.folder], capture_output=True, text=True, timeout=self.timeout)
            fault = done.returncode and f"ended with status {done.returncode}: {printable(done.stderr[-300:])}"
        except (OSError, subprocess.TimeoutExpired) as error:
            fault = printable(str(error))
        if fault:
            raise InputError(
                f"server_reload_command {shlex.join(self.command)!r} {fault}. The drafter is in {self.folder}. Run "
                "the command by hand until it works, and go on with resume_from_checkpoint=True."
            )
