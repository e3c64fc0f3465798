"""Write a drafter in another layout: the folder of its kind, which engines load, or vLLM's speculators.

A plain language model, too: of the target's tokens, as a drafter of the kind that --format names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.checks import settle
from ..core.limits import LIMITS


@dataclass
class ExportArguments:
    """What to write."""

    path: str = field(metadata={"help": "Drafter: path or id, in any layout; or a plain model.", "positional": True})
    output_dir: str = field(metadata={"help": "New folder."})
    format: str = field(metadata={"help": "The drafter's own kind (the folder it is published in), or speculators."})
    target: str | None = field(
        default=None,
        metadata={
            "help": "Its target: path or id, of which the config is read; a speculators folder names it, "
            "and of a kind that borrows its embedding holds that; a plain model gets its vocabulary."
        },
    )
    target_name: str | None = field(
        default=None, metadata={"help": "Id to name the target by, where --target is a local copy."}
    )
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto (as stored), bfloat16, float32."})
    revision: str | None = field(default=None, metadata={"help": "Of the drafter on the Hub."})

    def __post_init__(self) -> None:
        settle(self, LIMITS)


ARGUMENTS = (ExportArguments,)


def run(arguments: ExportArguments) -> dict[str, Any]:
    from ..folders.checkpoints import export_drafter
    from ..folders.inspection import inspect_drafter

    export_drafter(
        arguments.path,
        arguments.output_dir,
        arguments.format,
        target=arguments.target,
        target_name=arguments.target_name,
        dtype=arguments.dtype,
        revision=arguments.revision,
    )
    return inspect_drafter(arguments.output_dir, arguments.target)


def show(result: dict[str, Any]) -> str:
    from .inspect import show as show_folder

    return f"Written and read back.\n\n{show_folder(result)}"
