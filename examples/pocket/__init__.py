"""The pocket world: a tiny target, its tokenizer, drafters for it, and prompts, all shipped."""

from pathlib import Path
from typing import Any

from datasets import load_dataset

from draft_opd_trl.texts.prompts import tokenize_dataset


POCKET = Path(__file__).resolve().parent


def read_prompts(tokenizer: Any, name: str, count: int) -> list[list[int]]:
    """The first `count` tokenised prompts of a shipped file."""
    dataset = load_dataset("json", data_files=str(POCKET / "prompts" / name), split="train")
    return list(tokenize_dataset(dataset.select(range(count)), tokenizer, None, name=name)["prompt_ids"])
