"""The pocket world as the soak uses it: one target, its tokenizer and prompts, the folders of its drafters."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import Target, create_drafter, load_drafter, stop_token_ids
from draft_opd_trl.drafters.base import Drafter


ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "examples" / "pocket"
DRAFTERS = tuple(sorted(folder.name.removeprefix("drafter-") for folder in POCKET.glob("drafter-*")))


@dataclass
class World:
    """
    What every part stands on.

    Args:
        model: The target as transformers holds it.
        tokenizer: Its own.
        prompts (`list[list[int]]`): Token ids, chat template included.
        messages (`list`): The same, before the template.
    """

    model: Any
    tokenizer: Any
    prompts: list[list[int]]
    messages: list[Any]

    @functools.cached_property
    def target(self) -> Target:
        return Target(self.model)

    @functools.cached_property
    def stops(self) -> list[int]:
        return list(stop_token_ids(self.model, self.tokenizer))

    def shipped(self, name: str) -> Drafter:
        return load_drafter(folder_of(name)).bind(self.target)

    def random(self, kind: str, seed: int, **options: Any) -> Drafter:
        """An untrained drafter of a kind."""
        torch.manual_seed(seed)
        if kind in ("dflash", "dspark"):
            options = {"mask_token_id": 5, "num_hidden_layers": 1, **options}
        return create_drafter(kind, self.target, **options).eval().bind(self.target)


def folder_of(drafter: str) -> str:
    return str(POCKET / f"drafter-{drafter}")


@functools.cache
def world() -> World:
    """Loaded once, before any child is forked."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    rows = []
    for name in ("heldout.jsonl", "quickstart.jsonl"):
        rows += [json.loads(line)["prompt"] for line in (POCKET / "prompts" / name).read_text().splitlines()]
    options = {"add_generation_prompt": True, "return_dict": True}
    prompts = [tokenizer.apply_chat_template(row, **options)["input_ids"] for row in rows]
    return World(model, tokenizer, prompts, rows)
