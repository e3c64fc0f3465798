"""Messages and tools as data sets hold them → what a target's chat template writes; what it passes over is refused."""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError, InputTypeError


def without_none(value: Any) -> Any:
    """Arrow gives each row the keys of all rows, empty; a template would take them for something said."""
    if isinstance(value, dict):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def _content(message: dict) -> str:
    """What a message says, as one text."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message.get("tool_calls"):
        return ""
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}
        found = f"parts of type {', '.join(sorted(kinds))}" if kinds else f"the content {str(content)[:80]}"
        raise InputError(
            f"The message of role {message['role']!r} has {found}, but targets read text alone here: content must be "
            "text, or a list of parts of type 'text'. Drop such rows, or what is not text in them."
        )
    return "".join(texts)


def read_messages(value: Any) -> list[dict]:
    """A conversation with text as content, and without what Arrow filled in."""
    whole = isinstance(value, list) and value
    if not whole or not all(isinstance(part, dict) and isinstance(part.get("role"), str) for part in value):
        raise InputTypeError(
            f"A prompt must be a string or a list of messages with 'role' and 'content', not {value!r}."
        )
    return [{**without_none(message), "content": _content(message)} for message in value]


def read_tools(value: Any) -> list[dict] | None:
    """The functions that a row offers: JSON schemas, or their JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"`tools` is {value!r}, which is not JSON ({error}). Give a list of schemas.") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputTypeError(f"`tools` is {value!r}; it must be a list of JSON schemas, or their JSON.")
    return without_none(value)


# Roles that templates are written for. One that takes any role would pass "human" on as it stands.
ROLES = frozenset(
    "system developer user assistant model tool function ipython environment observation context document documents "
    "critic".split()
)


def templated(
    messages: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None,
    tools: list[dict] | None = None,
    tokenize: bool = True,
    **options: Any,
) -> Any:
    """What the chat template makes of messages: token ids, or their text."""
    if tokenizer.chat_template is None:
        raise InputError(
            "The data set is conversational, but the tokenizer has no chat template. Set `tokenizer.chat_template`, "
            "or give plain-text prompts."
        )
    options |= chat_template_kwargs or {}
    try:
        written = tokenizer.apply_chat_template(messages, tools, tokenize=tokenize, return_dict=tokenize, **options)
    except (TemplateError, TypeError) as error:  # the second, where a filter is given what it does not take
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The chat template refuses a conversation of the roles {roles}: {error}. Bring it into the form that the "
            "template knows, or drop it."
        ) from error
    return written["input_ids"] if tokenize else written


def end_of_turn(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict | None) -> int | None:
    """The special token that the template writes first after an assistant's text; else the tokenizer's eos."""
    said = "answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": said}]
    text = templated(turns, tokenizer, chat_template_kwargs, tokenize=False)
    after = tokenizer(text[text.rfind(said) + len(said) :], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)


def check_rendered(
    messages: list[dict],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None,
    tools: list[dict] | None,
    tried: set[str],
) -> None:
    """
    Try roles and tools once each: templates pass over those that they do not know without a word.

    Args:
        messages (`list[dict]`), tools (`list[dict]`, *optional*): As they are read.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]), chat_template_kwargs (`dict`): What writes them.
        tried (`set[str]`): What need not be tried again; added to.

    Raises:
        `ValueError`: The template writes nothing of a role, or of the tools.
    """

    def text(messages: list[dict], tools: list[dict] | None) -> str:
        return templated(messages, tokenizer, chat_template_kwargs, tools, tokenize=False)

    for index, message in enumerate(messages):
        # What an assistant says beside a call is left out by some templates that know the role.
        if message["role"] in tried or message.get("tool_calls"):
            continue
        role = message["role"]
        if role not in ROLES and role not in str(tokenizer.chat_template):
            known = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}.get(role.lower())
            raise InputError(
                f"A message has the role {role!r}, which is none of {', '.join(sorted(ROLES))}, and the chat template "
                f"does not name it. {f'Call it {known!r}.' if known else 'Correct it.'} Of a role that the target was "
                "taught all the same, give `prompt_ids`."
            )
        changed = [*messages[:index], {**message, "content": message["content"] + "x"}, *messages[index + 1 :]]
        if text(changed, tools) == text(messages, tools):
            raise InputError(
                f"The chat template writes nothing of messages of role {message['role']!r}. Rename the role to one "
                "that it knows (mostly system, user, assistant, tool), or drop such messages."
            )
        tried.add(message["role"])
    if tools and "tools" not in tried:
        if text(messages, tools) == text(messages, None):
            raise InputError(
                "The chat template writes nothing of `tools`, so the target would not know them. Set a chat template "
                "that does, or remove the column."
            )
        tried.add("tools")
