"""Data-set row → token ids.

Plain and conversational prompts, whole conversations, tools, chat-template switches, length limits. Knows no models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from pyarrow import compute
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.errors import InputError, InputTypeError, UserError
from .chat_template import check_rendered, end_of_turn, read_messages, read_tools, templated, without_none


logger = logging.get_logger(__name__)

PROMPT_COLUMNS = ("prompt", "prompt_ids", "messages")
COMPLETION_COLUMNS = ("completion", "completion_ids")


def prompt_ids(
    prompt: Any, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None = None, tools: Any = None
) -> list[int]:
    """
    Token ids of one prompt, generation prompt included.

    Args:
        prompt (`str` or `list[dict]`): Plain text, or messages with `role` and `content`, the last not the
            assistant's.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template, such as `{"enable_thinking": False}`.
        tools (`list[dict]` or `str`, *optional*): JSON schemas of functions, or their JSON; for the chat template.

    Raises:
        `TypeError`: The prompt is neither.
        `ValueError`: Messages that end in an assistant's turn, that are not text, or that the template refuses; or the
            tokenizer has no chat template.
    """
    tools = read_tools(tools)
    if isinstance(prompt, str):
        if tools:
            raise InputError(
                "`tools` stand beside a prompt of plain text, which has no place for them. Give messages."
            )
        return _plain_ids(prompt, tokenizer)
    messages = read_messages(prompt)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"The prompt ends with an assistant's turn ({messages[-1]['content'][:40]!r}), so the target would answer "
            "its own answer. Drop that turn, or call the column 'messages': its last turn is then dropped, or with "
            "rollout_source='dataset' taken as the completion."
        )
    return templated(messages, tokenizer, chat_template_kwargs, tools, add_generation_prompt=True)


def _plain_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Plain text with what the tokenizer puts before it, once."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begins)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    if bare and ids[-len(bare) :] != bare:
        raise InputError(
            f"The tokenizer puts {tokenizer.decode(ids[-1:])!r} behind a prompt, so the target would take it for "
            "ended. Load the tokenizer with add_eos_token=False."
        )
    return ids


def completion_ids(
    prompt: Any,
    completion: Any,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None = None,
    tools: Any = None,
) -> list[int]:
    """
    Token ids of a completion the target wrote, its stop token included where there is one.

    Plain text gets the token that ends an answer: after messages the one that the template writes there, else the
    tokenizer's eos. An answer in messages ends as the template ends it.

    Raises:
        `ValueError`: The completion is not one assistant's message, or the templated prompt is not a prefix of the
            templated conversation, so where the completion starts is unknown.
    """
    if isinstance(completion, str):
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        end = end_of_turn(tokenizer, chat_template_kwargs) if isinstance(prompt, list) else tokenizer.eos_token_id
        return ids if not ids or end is None or ids[-1] == end else [*ids, end]
    answer = read_messages(completion)
    if [message["role"] for message in answer] != ["assistant"] or isinstance(prompt, str):
        raise InputError(
            f"The completion has the roles {', '.join(message['role'] for message in answer)} after a prompt of type "
            f"{type(prompt).__name__}, but a completion in messages is one message of the assistant after messages. "
            "Call a column of whole conversations 'messages'."
        )
    start = prompt_ids(prompt, tokenizer, chat_template_kwargs, tools)
    whole = templated([*read_messages(prompt), *answer], tokenizer, chat_template_kwargs, read_tools(tools))
    if whole[: len(start)] != start:
        raise InputError(
            "The chat template changes the prompt when a completion follows, so the completion's first token cannot "
            "be found. Store `prompt_ids` and `completion_ids` as they were generated instead."
        )
    return whole[len(start) :]


def row_prompt(row: dict) -> Any:
    """What a row asks, text or messages: of a whole conversation, all but an answer at its end."""
    if "messages" not in row:
        return row.get("prompt")
    messages = read_messages(row["messages"])
    ends = len(messages) > 1 and messages[-1]["role"] == "assistant"
    return messages[:-1] if ends else messages


def check_columns(dataset: Dataset, needs_completions: bool, name: str) -> None:
    """
    Raises:
        `TypeError`: A streaming data set, whose rows cannot be counted.
        `ValueError`: The data set is empty or lacks the columns, or has them in two ways.
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
            f"`{name}` has the columns {sorted(columns)}, none of which is 'prompt' (text or messages), 'prompt_ids' "
            "(token ids) or 'messages' (whole conversations, answers included). Rename yours with "
            "`dataset.rename_column`."
        )
    others = columns & {"prompt", "prompt_ids", *COMPLETION_COLUMNS}
    if "messages" in columns and others:
        raise InputError(
            f"`{name}` has the column 'messages' beside {sorted(others)}, so a text is there twice. Keep the "
            "one that is meant with `dataset.remove_columns`."
        )
    if needs_completions and not columns & {*COMPLETION_COLUMNS, "messages"}:
        raise InputError(
            f"rollout_source='dataset' reads texts the target wrote, but `{name}` has the columns {sorted(columns)}, "
            "none of which is 'completion', 'completion_ids' or 'messages'. Add one, or use "
            "rollout_source='speculation'."
        )


def _checked_ids(ids: Any, column: str) -> list[int]:
    """Token ids as a row gives them."""
    given = ids
    if isinstance(ids, list) and all(type(token) is float and token.is_integer() for token in ids):
        ids = [int(token) for token in ids]  # one fraction in a file makes its whole column one of fractions
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputTypeError(f"`{column}` is {str(given)[:80]}; it must be a list of token ids, integers from 0 up.")
    return list(ids)


class _Rows:
    """Rows of one data set → prompts and completions in token ids. It remembers what of the template it has tried."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None, completions: bool
    ) -> None:
        self.tokenizer, self.kwargs, self.completions = tokenizer, chat_template_kwargs or {}, completions
        self.tried: set[str] = set()

    def texts(self, row: dict) -> Iterator[tuple[list[int], list[int] | None]]:
        """Prompt and completion (`None` where none is read) of each text in a row: one, or one an assistant's turn."""
        kwargs = {**self.kwargs, **without_none(row.get("chat_template_kwargs") or {})}
        tools = read_tools(row.get("tools"))
        for prompt, completion in self._cut(row):
            if isinstance(prompt, list):
                check_rendered(read_messages(prompt), self.tokenizer, kwargs, tools, self.tried)
            ids = row.get("prompt_ids")
            ids = prompt_ids(prompt, self.tokenizer, kwargs, tools) if ids is None else _checked_ids(ids, "prompt_ids")
            text = None
            if self.completions:
                text = row.get("completion_ids")
                text = (
                    completion_ids(prompt, completion, self.tokenizer, kwargs, tools)
                    if text is None
                    else _checked_ids(text, "completion_ids")
                )
            yield ids, text

    def _cut(self, row: dict) -> list[tuple[Any, Any]]:
        """Where a row's prompts end and its completions are."""
        if "messages" not in row:
            return [(row.get("prompt"), row.get("completion"))]
        if not self.completions:
            return [(row_prompt(row), None)]
        messages = read_messages(row["messages"])
        turns = [index for index in range(1, len(messages)) if messages[index]["role"] == "assistant"]
        if not turns:
            raise InputError(
                "The conversation has no answer of an assistant, so there is nothing to learn from. Drop such rows, "
                "or use rollout_source='speculation', where the target answers."
            )
        return [(messages[:index], messages[index : index + 1]) for index in turns]


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

    What is made of the rows beyond their words is said once: answers that are dropped, turns that become rows, stop
    tokens that are added.

    Args:
        dataset ([`~datasets.Dataset`]): With `prompt`, `prompt_ids` or `messages`, and completions where they are
            needed; `tools` and `chat_template_kwargs` of single rows if there are such columns.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        max_prompt_length (`int`, *optional*): Longest prompt allowed, in tokens.
        chat_template_kwargs (`dict`, *optional*): Passed to the chat template.
        needs_completions (`bool`, *optional*, defaults to `False`): Texts come from the data set.
        truncate_prompts (`bool`, *optional*, defaults to `False`): Cut longer prompts from the left, do not raise.
        name (`str`, *optional*): For errors.

    Raises:
        `TypeError` or `ValueError`: Missing columns, an empty data set, an empty prompt or completion, a prompt over
            the limit, or a row of which no prompt can be made; with the row's number.
    """
    check_columns(dataset, needs_completions, name)
    rows = _Rows(tokenizer, chat_template_kwargs, needs_completions)

    def convert(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        converted: dict[str, list] = {"prompt_ids": [], **({"completion_ids": []} if needs_completions else {})}
        for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
            try:
                texts = list(rows.texts(dict(zip(batch, values, strict=True))))
            except UserError as error:
                raise type(error)(f"Row {index} of `{name}`: {error}") from error
            for ids, text in texts:
                if not ids:
                    raise InputError(f"Row {index} of `{name}` has an empty prompt; remove it.")
                if max_prompt_length is not None and len(ids) > max_prompt_length:
                    if not truncate_prompts:
                        raise InputError(
                            f"Row {index} of `{name}` has a prompt of {len(ids)} tokens, more than max_prompt_length="
                            f"{max_prompt_length}. Raise the limit, drop such rows, or set truncate_prompts=True to "
                            "keep their last tokens."
                        )
                    ids = ids[-max_prompt_length:]
                converted["prompt_ids"].append(ids)
                if needs_completions:
                    if not text:
                        raise InputError(f"Row {index} of `{name}` has an empty completion; remove it.")
                    converted["completion_ids"].append(text)
        return converted

    made = ("prompt_ids", "completion_ids") if needs_completions else ("prompt_ids",)
    tokenized = dataset.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        # Said, as a column of ids would else keep the type it had in the file, whatever was mixed there.
        features=Features({column: List(Value("int64")) for column in made}),
        desc=f"Tokenizing {name}",
    )
    _say_what_was_made(dataset, tokenized, tokenizer, needs_completions, name)
    return tokenized


def _say_what_was_made(
    dataset: Dataset, tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, needs_completions: bool, name: str
) -> None:
    # Counted from the rows: what `map` finds in its cache is not converted again.
    said = None
    if "messages" in dataset.column_names and needs_completions:
        said = f"each answer of an assistant is a row: {len(tokenized)} of {len(dataset)} conversations"
    elif "messages" in dataset.column_names:
        ends = sum(messages[-1]["role"] == "assistant" for messages in dataset["messages"])
        if ends:
            said = f"{ends} of {len(dataset)} conversations end with an answer, dropped as the target writes its own"
    elif needs_completions and "completion_ids" not in dataset.column_names:
        plain = sum(isinstance(completion, str) for completion in dataset["completion"])
        if plain:
            said = (
                f"{plain} completions are plain text, and each is ended with a stop token, as text that was cut short "
                "must not be: store that as 'completion_ids'"
            )
    if said and PartialState().is_main_process:
        logger.warning(f"`{name}`: {said}.")


def check_fit(
    datasets: dict[str, Dataset],
    vocab_size: int,
    context_length: int | None,
    max_new_tokens: int,
    num_draft_tokens: int,
) -> None:
    """
    Hold tokenised rows to what the target takes.

    Args:
        datasets (`dict[str, Dataset]`): From [`tokenize_dataset`], by the name for errors.
        vocab_size (`int`): Of the target.
        context_length (`int`, *optional*): Positions that the target knows.
        max_new_tokens (`int`): Longest completion.
        num_draft_tokens (`int`): K; proposals stand behind the text.

    Raises:
        `ValueError`: A token id outside the vocabulary, with its row, or texts longer than the context.
    """
    for name, dataset in datasets.items():
        table = dataset.with_format("arrow")[:]
        for column in table.column_names:
            ids = table[column].combine_chunks()
            if (compute.max(ids.flatten()).as_py() or 0) >= vocab_size:
                row = next(row for row, tokens in enumerate(ids.to_pylist()) if max(tokens) >= vocab_size)
                raise InputError(
                    f"Row {row} of `{name}` has the token id {max(ids[row].as_py())} in `{column}`, but the target's "
                    f"vocabulary ends at {vocab_size - 1}. Tokenise it with the target's tokenizer."
                )
        longest = compute.max(compute.list_value_length(table["prompt_ids"])).as_py()
        needed = longest + max_new_tokens + num_draft_tokens
        if context_length is not None and needed > context_length:
            raise InputError(
                f"`{name}` needs {needed} positions ({longest} of its longest prompt, {max_new_tokens} of a "
                f"completion, {num_draft_tokens} of a block), but the target knows {context_length} "
                "(max_position_embeddings). Lower the completion's limit, or drop long prompts."
            )


def warn_of_open_ends(dataset: Dataset, stop_token_ids: Sequence[int], max_new_tokens: int, name: str) -> None:
    """
    Warn of completions that end before the limit without a stop token: the drafter would not learn to propose it.

    Args:
        dataset ([`~datasets.Dataset`]): Tokenised, with completions.
        stop_token_ids (`Sequence[int]`): Of the target.
        max_new_tokens (`int`): Longest completion.
        name (`str`): For the warning.
    """
    stops = set(stop_token_ids)
    open_ends = sum(len(ids) < max_new_tokens and stops.isdisjoint(ids) for ids in dataset["completion_ids"])
    if open_ends and PartialState().is_main_process:
        logger.warning(
            f"`{name}`: {open_ends} of {len(dataset)} completions hold none of the target's stop tokens "
            f"{sorted(stops)} and are shorter than max_completion_length={max_new_tokens}, so the drafter does not "
            "learn how they end. Store them with the stop token, unless they were cut short."
        )
