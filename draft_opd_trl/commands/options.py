"""Options that several commands share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PairArguments:
    """A drafter and its target."""

    model_name_or_path: str = field(metadata={"help": "Drafter: path or id.", "aliases": ["--model"]})
    teacher_model_name_or_path: str = field(
        metadata={"help": "Target: path or id.", "aliases": ["--teacher", "--teacher_model"]}
    )


def read_chat_kwargs(text: str) -> dict[str, Any]:
    """
    What `--chat_template_kwargs` gives the chat template.

    Raises:
        `ValueError`: It is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat_template_kwargs {text} is not JSON: {error}.") from error
