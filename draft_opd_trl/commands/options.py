"""Options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PairArguments:
    """A drafter and its target."""

    model_name_or_path: str = field(metadata={"help": "Drafter: path or id.", "aliases": ["--model"]})
    teacher_model_name_or_path: str = field(
        metadata={"help": "Target: path or id.", "aliases": ["--teacher", "--teacher_model"]}
    )
