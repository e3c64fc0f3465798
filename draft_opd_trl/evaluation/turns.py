"""The second turn of a conversation: what a suite asks after the target's own answer to its first question.

Knows no drafters: who wrote the answers, and how, is settled before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError, UserError
from ..texts.prompts import prompt_ids


# The column with what is asked second; a suite without it has one turn.
FOLLOW_UP = "follow_up"


def second_prompts(
    suite: Dataset,
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """
    Prompts of the second turn: the first question, its answer, and what is asked then, as a chat template writes them.

    Special tokens in an answer, its stop token among them, are left to the template, as a chat client would.

    Args:
        suite ([`~datasets.Dataset`]): Messages in `prompt`, and a text in `follow_up`.
        answers (`Sequence[Sequence[int]]`): By row, the token ids that the target wrote.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template.

    Raises:
        `ValueError` or `TypeError`: A row whose prompt is not messages, or whose follow-up is not text.
    """
    prompts = []
    for number, (row, answer) in enumerate(zip(suite, answers, strict=True)):
        if not isinstance(row["prompt"], list):
            raise InputError(
                f"Row {number} has a {FOLLOW_UP!r} beside the prompt {row['prompt']!r:.60}, but a second turn needs "
                f"messages. Give the prompt as messages, or remove the column {FOLLOW_UP!r}."
            )
        said = {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}
        asked = {"role": "user", "content": row[FOLLOW_UP]}
        try:
            prompts.append(prompt_ids([*row["prompt"], said, asked], tokenizer, chat_template_kwargs))
        except UserError as error:
            raise type(error)(f"The second turn of row {number}: {error}") from error
    return prompts


def second_turns(
    suites: Mapping[str, Dataset],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[dict[str, Callable[[Sequence[Sequence[int]]], list[list[int]]]], dict[str, Dataset]]:
    """
    Of the suites that ask twice, by name: answers → prompts of the second turn; and, to hold these to what the target
    takes before anything is decoded, the prompts around empty answers, as `prompt_ids`.

    Raises:
        `ValueError` or `TypeError`: As [`second_prompts`] does.
    """
    ask_again = {
        name: partial(second_prompts, suite, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs)
        for name, suite in suites.items()
        if {"prompt", FOLLOW_UP} <= set(suite.column_names)
    }
    unanswered = {
        f"{name}, second turn": Dataset.from_dict({"prompt_ids": ask([[]] * len(suites[name]))})
        for name, ask in ask_again.items()
    }
    return ask_again, unanswered
