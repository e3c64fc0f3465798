"""Prompts as a server templates them, held against ours: thinking, what stands before the text, the template itself.

Knows no drafters and no counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError
from ..texts.chat_template import read_tools, without_none
from ..texts.engine_counts import EngineStats
from ..texts.prompts import prompt_ids, row_prompt


# Switches of chat templates that turn thinking on and off.
THINKING = ("enable_thinking", "thinking")
# Rows that are templated anew to find out why they differ, and tokens shown of a place where they part.
NUM_TRIED, SHOWN = 8, 12


@dataclass
class Check:
    """
    A possible cause of a difference, and what was seen.

    Args:
        cause (`str`): In a few words.
        found (`bool`, *optional*): It is one; `None` where it could not be judged.
        said (`str`): What was seen.
        remedy (`str`): What to do, where it is one.
    """

    cause: str
    found: bool | None
    said: str
    remedy: str = ""


def row_kwargs(row: dict[str, Any], chat_template_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the chat template is given for a row."""
    return {**chat_template_kwargs, **without_none(row.get("chat_template_kwargs") or {})}


def served_prompts(stats: EngineStats, suite: Dataset, chat_template_kwargs: dict[str, Any]) -> list[list[int]] | None:
    """
    Ids of a suite's prompts as the server makes them, as for a chat client that sends these `chat_template_kwargs`;
    `None` where it does not tell.

    Raises:
        `ServerError`: It refuses a prompt.
    """
    prompts = []
    for row in suite:
        ids = row.get("prompt_ids")
        if ids is None:
            prompt = row_prompt(row)
            ids = stats.template(prompt, row_kwargs(row, chat_template_kwargs), read_tools(row.get("tools")))
        if ids is None:
            return None
        prompts.append(list(ids))
    return prompts


def check_prompts(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]] | None,
    suite: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any],
) -> Check:
    """
    Whether the server makes the prompts that we make.

    Args:
        ours, theirs (`Sequence[Sequence[int]]`): Ids by row; the server's may be unknown.
        suite ([`~datasets.Dataset`]): The rows.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Ours.
        chat_template_kwargs (`dict`): What both were given.
    """
    cause = "prompts"
    if theirs is None:
        return Check(cause, None, "the server has no /tokenize that shows how it templates; it was sent our ids")
    differing = [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if list(one) != list(other)]
    if not differing:
        return Check(cause, False, f"the server makes the same ids of all {len(ours)} prompts")
    where = f"{len(differing)} of {len(ours)} prompts have other ids"
    rows = [(i, suite[i]) for i in differing[:NUM_TRIED]]
    for name, value in _switches(chat_template_kwargs):
        kwargs = {**chat_template_kwargs, name: value}
        if all(_templated(row, tokenizer, kwargs, value is None and name) == theirs[i] for i, row in rows):
            given = chat_template_kwargs.get(name, "unset")
            as_if = "unset" if value is None else str(value).lower()
            return Check(
                "thinking",
                True,
                f"{where}: the server writes them as with `{name}` {as_if}, and it is {str(given).lower()} here",
                f"Give the server `{name}` as the drafter was trained (vLLM: --default-chat-template-kwargs; or in "
                "every request), or evaluate and train with --chat_template_kwargs as it serves.",
            )
    first = differing[0]
    one, other = list(ours[first]), list(theirs[first])
    if one[1:] == other or other[1:] == one or one[1:] == other[1:]:
        return Check(
            "first token",
            True,
            f"{where}, and differ in their first token: {_shown(tokenizer, other[:2])} served, "
            f"{_shown(tokenizer, one[:2])} here",
            "Bring `add_bos_token` of the tokenizer and the bos token in the chat template into line on both sides.",
        )
    pairs = enumerate(zip(one, other, strict=False))
    place = next((i for i, (mine, yours) in pairs if mine != yours), min(len(one), len(other)))
    return Check(
        "template",
        True,
        f"{where}; row {first} parts at token {place}: {_shown(tokenizer, other[place:])} served, "
        f"{_shown(tokenizer, one[place:])} here",
        "Serve with the target's own chat template (--chat-template), system prompt and tools, or train on prompts as "
        "they are served.",
    )


def _switches(given: dict[str, Any]) -> list[tuple[str, bool | None]]:
    """Settings of templates that may stand otherwise on the server, other than they are given."""
    names = dict.fromkeys([*(name for name, value in given.items() if isinstance(value, bool)), *THINKING])
    return [(name, value) for name in names for value in (True, False, None) if given.get(name) is not value]


def _templated(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], unset: str | bool
) -> list[int] | None:
    """A row's ids with other settings; `None` where there are none."""
    kwargs = row_kwargs(row, kwargs)
    if unset:
        del kwargs[unset]
    try:
        return list(prompt_ids(row_prompt(row), tokenizer, kwargs, read_tools(row.get("tools"))))
    except UserError:
        return None


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return repr(tokenizer.decode(ids[:SHOWN])) if ids else "nothing"
