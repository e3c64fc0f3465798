"""Lines of a server's or a proxy's log → the answers in them, each with the conversation that it answered.

Three forms, and what proxies make of them: OpenAI's chat `messages`; a `request` beside its `response`; a prompt
beside its answer. Knows no tokenizers, no templates and no models.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import EnvironmentFault, InputError, NotFoundError


SUFFIXES = (".jsonl", ".jsonl.gz")
# Why a line gives nothing, as the table of a harvest says it.
NOT_JSON, UNKNOWN, FAILED, NO_ANSWER = "no JSON object", "of no known form", "a failed request", "without an answer"
# How engines say that a text ended by itself. Anything else (length, abort, …) cut it short.
ENDED = (None, "stop", "eos", "eos_token", "end_turn", "tool_calls", "function_call")
# What of a message a chat template reads.
_MESSAGE = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


class Unusable(Exception):  # noqa: N818, as nothing is wrong with the log
    """
    A line, or an answer, that gives no row.

    Args:
        reason (`str`): One of a few, to count by.
        detail (`str`, *optional*): What is particular about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class Turn:
    """
    An answer, and what it answered.

    Args:
        prompt (`list[dict]` or `str`, *optional*): The messages before it, or plain text.
        answer (`dict` or `str`, *optional*): The assistant's message, or its text.
        prompt_ids, completion_ids (`list[int]`, *optional*): The same as the server saw and wrote them, where the log
            says so: then nothing is tokenised again.
        open_end (`bool`, *optional*, defaults to `False`): Cut short, so that no stop token may be added.
        tools, chat_template_kwargs (*optional*): The request's.
    """

    prompt: list[dict] | str | None = None
    answer: dict | str | None = None
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    open_end: bool = False
    tools: Any = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def opening(self) -> str:
        """What tells conversations apart: all up to the first message of the user."""
        if isinstance(self.prompt, list):
            first = next((place for place, message in enumerate(self.prompt) if message.get("role") == "user"), 0)
            return json.dumps(self.prompt[: first + 1], sort_keys=True, default=str)
        return self.prompt if self.prompt is not None else str(self.prompt_ids)


def check_logs(files: Sequence[str]) -> None:
    """
    Raises:
        `FileNotFoundError`: One of them is not there.
        `ValueError`: It is no file of lines, or there twice.
    """
    for place, file in enumerate(files):
        if not Path(file).is_file():
            raise NotFoundError(f"{file} is not a file here. Give logs, {' or '.join(SUFFIXES)}.")
        if not file.endswith(SUFFIXES):
            raise InputError(
                f"{file} is not called {' or '.join(SUFFIXES)}, and a log has a JSON object a line. Rename it if it "
                "is such a file, or write it as one."
            )
        if file in files[:place]:
            raise InputError(f"{file} is given twice. Name each log once.")


def read_log(files: Sequence[str], on_bytes: Callable[[int], Any]) -> Iterator[tuple[str, dict | Unusable]]:
    """
    The lines of logs, one at a time, whatever their number.

    Args:
        files (`Sequence[str]`): See [`check_logs`].
        on_bytes (`Callable`): Told how many bytes more were read.

    Returns:
        Where a line stands, as `file:line`, and its object, or why it is none: a broken line costs itself alone.

    Raises:
        `OSError`: A file that cannot be read, or is no whole gzip file.
    """
    for file in files:
        try:
            with open(file, "rb") as raw, gzip.open(raw) if file.endswith(".gz") else raw as lines:
                read = 0
                for number, line in enumerate(lines, start=1):
                    on_bytes(raw.tell() - read)
                    read = raw.tell()
                    if line.strip():
                        yield f"{file}:{number}", _object(line)
        except (OSError, EOFError) as error:
            raise EnvironmentFault(f"{file} cannot be read to its end ({error}). Give a log that can.") from error


def _object(line: bytes) -> dict | Unusable:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Unusable(NOT_JSON, str(error))
    return row if isinstance(row, dict) else Unusable(NOT_JSON, f"holds {row!r:.60}")


def turns_of(row: dict) -> list[Turn]:
    """
    The answers of a line: its own, and those of the assistant that stand in its messages already.

    Raises:
        `Unusable`: There is none.
    """
    request, response = _body(row.get("request", row)), _body(row.get("response"))
    if not isinstance(request, dict):
        raise Unusable(UNKNOWN, f"its request is {request!r:.60}")
    prompt = request.get("messages", request.get("prompt"))
    told = response.get("prompt_token_ids") if isinstance(response, dict) else None
    told = request.get("prompt_ids") if told is None else told
    if isinstance(prompt, list) and prompt and type(prompt[0]) is int:
        prompt, told = None, prompt
    told = _token_ids(told)
    if isinstance(prompt, list):
        prompt = [_message(message) for message in prompt]
    elif not isinstance(prompt, str) and not told:
        raise Unusable(UNKNOWN, f"has the keys {', '.join(map(str, row))}"[:200])
    kwargs = request.get("chat_template_kwargs")
    shared = {"tools": request.get("tools"), "chat_template_kwargs": kwargs if isinstance(kwargs, dict) else {}}
    turns = []
    if isinstance(prompt, list):
        places = [place for place in range(1, len(prompt)) if prompt[place]["role"] == "assistant"]
        turns = [Turn(prompt[:place], prompt[place], **shared) for place in places]
    own = [Turn(prompt, prompt_ids=told, **answer, **shared) for answer in _answers(request, response)]
    if not turns and not own:
        raise Unusable(NO_ANSWER)
    return turns + own


def _body(part: Any) -> Any:
    """A request or a response without what batch files and proxies wrap around it."""
    if isinstance(part, str) and part.lstrip().startswith("{"):
        try:
            part = json.loads(part)
        except (ValueError, RecursionError):
            return part  # an answer that begins so
    return _body(part["body"]) if isinstance(part, dict) and isinstance(part.get("body"), dict | str) else part


def _answers(request: dict, response: Any) -> list[dict[str, Any]]:
    """What a line says beside its messages, as arguments of [`Turn`]."""
    if isinstance(response, dict) and "role" not in response:
        if not isinstance(response.get("choices"), list):
            raise Unusable(FAILED, f"its response holds {', '.join(map(str, response)) or 'nothing'}"[:200])
        return [_choice(choice, request) for choice in response["choices"]]
    if request.get("completion_ids") is not None:
        # As it was generated, so nothing is to be added.
        return [{"completion_ids": _token_ids(request["completion_ids"]), "open_end": True}]
    answer = request.get("completion") if response is None else response
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if answer is None:
        return []
    return [{"answer": answer if isinstance(answer, str) else _message(answer)}]


def _token_ids(ids: Any) -> list[int] | None:
    if ids is not None and not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise Unusable(UNKNOWN, f"its token ids are {ids!r:.60}")
    return ids


def _choice(choice: Any, request: dict) -> dict[str, Any]:
    if not isinstance(choice, dict):
        raise Unusable(FAILED, f"a choice is {choice!r:.60}")
    answer = choice.get("text") if choice.get("message") is None else _message(choice["message"])
    ids = _token_ids(choice.get("token_ids"))
    if answer is None and ids is None:
        raise Unusable(FAILED, "a choice has neither `message` nor `text`")
    cut = choice.get("finish_reason") not in ENDED
    # A stop string ended it, which leaves no stop token. Where the server does not say, it may have been one.
    reason = choice.get("stop_reason", "unknown")
    cut = cut or isinstance(reason, str) and bool(request.get("stop"))
    return {"answer": answer, "completion_ids": ids, "open_end": cut}


def _message(message: Any) -> dict:
    """A message as chat templates know it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Unusable(UNKNOWN, f"a message is {message!r:.60}")
    known = {key: message[key] for key in _MESSAGE if message.get(key) not in (None, [])}
    if message.get("reasoning") and "reasoning_content" not in known:
        known["reasoning_content"] = message["reasoning"]
    if "tool_calls" in known:
        known["tool_calls"] = [_call(call) for call in known["tool_calls"]]
    return {"content": None, **known}


def _call(call: Any) -> Any:
    """A call whose arguments are a mapping: servers send their JSON, which templates would write as one string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
