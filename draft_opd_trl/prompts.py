"""Data-set row → prompt token ids.

Plain and conversational prompts, chat-template switches, length limits. Knows no models.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .errors import InputError, InputTypeError


PROMPT_COLUMNS = ("prompt", "prompt_ids")
COMPLETION_COLUMNS = ("completion", "completion_ids")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def prompt_ids(prompt: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None) -> list[int]:
    """
    Token ids of one prompt, generation prompt included.

    Args:
        prompt (`str` or `list[dict]`): Plain text, or messages with `role` and `content`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        `TypeError`: The prompt is neither.
        `ValueError`: Messages, but the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not _is_messages(prompt):
        raise InputTypeError(
            f"A prompt must be a string or a list of messages with 'role' and 'content', not {prompt!r}."
        )
    if tokenizer.chat_template is None:
        raise InputError(
            "The data set is conversational, but the tokenizer has no chat template. Set `tokenizer.chat_template`, "
            "or give plain-text prompts."
        )
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def completion_ids(
    prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None
) -> list[int]:
    """
    Token ids of a completion the target wrote, its stop token included where the template writes one.

    Raises:
        `ValueError`: The templated prompt is not a prefix of the templated conversation, so where the completion
            starts is unknown.
    """
    if isinstance(completion, str):
        return tokenizer(completion, add_special_tokens=False)["input_ids"]
    start = prompt_ids(prompt, tokenizer, chat_template_kwargs)
    whole = tokenizer.apply_chat_template(
        [*prompt, *completion], tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]
    if whole[: len(start)] != start:
        raise InputError(
            "The chat template changes the prompt when a completion follows, so the completion's first token cannot "
            "be found. Store `prompt_ids` and `completion_ids` as they were generated instead."
        )
    return whole[len(start) :]


def check_columns(dataset: Dataset, needs_completions: bool, name: str) -> None:
    """
    Raises:
        `TypeError`: A streaming data set, whose rows cannot be counted.
        `ValueError`: The data set is empty or lacks the columns.
    """
    if not isinstance(dataset, Dataset):
        raise InputTypeError(
            f"`{name}` is a {type(dataset).__name__}; prompts must be a `datasets.Dataset`, whose rows can be counted "
            "and drawn in any order. Take a part of a stream with `Dataset.from_list(list(stream.take(n)))`."
        )
    columns = set(dataset.column_names)
    if len(dataset) == 0:
        raise InputError(f"`{name}` is empty; it needs at least one row.")
    if not columns & set(PROMPT_COLUMNS):
        raise InputError(
            f"`{name}` has the columns {sorted(columns)}, none of which is 'prompt' (text or messages) or "
            "'prompt_ids' (token ids). Rename yours with `dataset.rename_column`."
        )
    if needs_completions and not columns & set(COMPLETION_COLUMNS):
        raise InputError(
            f"rollout_source='dataset' reads texts the target wrote, but `{name}` has the columns {sorted(columns)}, "
            "none of which is 'completion' or 'completion_ids'. Add one, or use rollout_source='speculation'."
        )


def tokenize_dataset(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    chat_template_kwargs: dict | None = None,
    needs_completions: bool = False,
    truncate_prompts: bool = False,
    name: str = "train_dataset",
) -> Dataset:
    """
    The data set as `prompt_ids` (and `completion_ids`), checked before anything expensive.

    Args:
        dataset ([`~datasets.Dataset`]): With `prompt` or `prompt_ids`, and completions where they are needed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        max_prompt_length (`int`, *optional*): Longest prompt allowed, in tokens.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template.
        needs_completions (`bool`, *optional*, defaults to `False`): Texts come from the data set.
        truncate_prompts (`bool`, *optional*, defaults to `False`): Cut longer prompts from the left, do not raise.
        name (`str`, *optional*): For errors.

    Raises:
        `ValueError`: Missing columns, an empty data set, an empty prompt or completion, or a prompt over the limit.
    """
    check_columns(dataset, needs_completions, name)

    def convert(row: dict, index: int) -> dict:
        ids = row.get("prompt_ids")
        ids = prompt_ids(row["prompt"], tokenizer, chat_template_kwargs) if ids is None else list(ids)
        if not ids:
            raise InputError(f"Row {index} of `{name}` has an empty prompt; remove it.")
        if max_prompt_length is not None and len(ids) > max_prompt_length:
            if not truncate_prompts:
                raise InputError(
                    f"Row {index} of `{name}` has a prompt of {len(ids)} tokens, more than max_prompt_length="
                    f"{max_prompt_length}. Raise the limit, drop such rows, or set truncate_prompts=True to keep "
                    "their last tokens."
                )
            ids = ids[-max_prompt_length:]
        converted = {"prompt_ids": ids}
        if needs_completions:
            text = row.get("completion_ids")
            if text is None:
                text = completion_ids(row.get("prompt"), row["completion"], tokenizer, chat_template_kwargs)
            if not text:
                raise InputError(f"Row {index} of `{name}` has an empty completion; remove it.")
            converted["completion_ids"] = list(text)
        return converted

    return dataset.map(convert, with_indices=True, remove_columns=dataset.column_names, desc=f"Tokenizing {name}")
