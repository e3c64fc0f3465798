"""Answers of logged conversations → rows to train on: each as the target's template writes it, and read by the target.

Knows no forms of logs. What gives no row is counted, by reason.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..core.checks import check_value
from ..core.errors import UserError
from ..core.limits import CHAT_KWARGS
from ..core.records import Rollout
from ..core.sampling_params import SamplingParams
from ..core.target import Target
from ..decoding.plain import until_stop
from .authorship import TextFit, describe, text_fit
from .chat_template import check_rendered, end_of_turn, read_messages, read_tools, templated
from .prompts import completion_ids, prompt_ids
from .traffic import Turn, Unusable, turns_of


UNTEMPLATED, REWRITTEN = "refused by the chat template", "rewritten by the chat template"
EMPTY, TOO_LONG, SEEN = "empty, or of one token", "too long", "seen already"
OUTSIDE, STRANGE = "of ids outside the vocabulary", "not what the target writes"
# Answers that the target reads before the next lines are: of similar lengths side by side, so that little is padding.
WINDOW = 64
# Texts that the message about what the target did not write describes.
NUM_DESCRIBED = 64


@dataclass
class Row:
    """A text of the target's, and the conversation it is from."""

    conversation: bytes
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass
class Tally:
    """
    What came of a log.

    Args:
        lines, answers, kept, cut_short (`int`): Read; found in them; kept as rows; of these, without a stop token.
        dropped (`dict[str, dict]`): By reason: how many (`count`), where the `first` was, and what was said of it
            (`detail`).
    """

    lines: int = 0
    answers: int = 0
    kept: int = 0
    cut_short: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, place: str, why: Unusable) -> None:
        """One more that gave no row."""
        entry = self.dropped.setdefault(why.reason, {"count": 0, "first": place, "detail": why.detail})
        entry["count"] += 1


class Harvest:
    """
    Reads conversations with a target's eyes.

    Args:
        target ([`Target`]): Reads every answer once.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        sampling ([`SamplingParams`]): The law that the answers were drawn by.
        stop_token_ids (`list[int]`): They end a text.
        pad_token_id (`int`): For batches.
        chat_template_kwargs (`dict`, *optional*): For the chat template; a request's own win over them.
        max_prompt_length (`int`, *optional*): Longer prompts are dropped. Whatever it is, so are texts that are longer
            than the target's context.
        max_completion_length (`int`, *optional*): Longer answers are cut there.

    Attributes:
        tally ([`Tally`]): What came of it so far.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingParams,
        stop_token_ids: list[int],
        pad_token_id: int,
        chat_template_kwargs: dict[str, Any] | None = None,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
    ) -> None:
        self.target, self.tokenizer, self.sampling = target, tokenizer, sampling
        self.stops, self.pad_token_id, self.kwargs = stop_token_ids, pad_token_id, chat_template_kwargs or {}
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.tally = Tally()
        self._tried: set[str] = set()  # of the template, see `check_rendered`
        self._seen: set[bytes] = set()
        self._strangers: deque[TextFit] = deque(maxlen=NUM_DESCRIBED)

    def rows(
        self, lines: Iterable[tuple[str, dict | Unusable]], on_rows: Callable[[int], Any] = lambda kept: None
    ) -> Iterator[Row]:
        """
        The rows of a log, in its order.

        Args:
            lines (`Iterable`): As from [`read_log`].
            on_rows (`Callable`, *optional*): Told how many there are, now and then.
        """
        waiting: list[tuple[str, Row]] = []
        for place, line in lines:
            self.tally.lines += 1
            waiting += self._read(place, line)
            if len(waiting) >= WINDOW:
                yield from self._judged(waiting)
                on_rows(self.tally.kept)
                waiting = []
        yield from self._judged(waiting)

    def strangers(self) -> str | None:
        """What the target says of texts that are not its own, in words and numbers; `None` where there were none."""
        return describe(TextFit.cat(list(self._strangers)), self.sampling) if self._strangers else None

    def _read(self, place: str, line: dict | Unusable) -> Iterator[tuple[str, Row]]:
        """The answers of a line that are new and short enough, and where it stands."""
        try:
            if isinstance(line, Unusable):
                raise line
            turns = turns_of(line)
        except Unusable as why:
            self.tally.drop(place, why)
            return
        for turn in turns:
            self.tally.answers += 1
            try:
                yield place, self._row(turn)
            except Unusable as why:
                self.tally.drop(place, why)

    def _row(self, turn: Turn) -> Row:
        try:
            prompt, text = self._ids(turn)
        except UserError as error:
            raise Unusable(UNTEMPLATED, str(error)) from error
        text = until_stop(text[: self.max_completion_length], self.stops)
        if turn.open_end and turn.completion_ids is None and text and text[-1] in self.stops:
            text = text[:-1]  # the template's, and not the target's
        if not prompt or len(text) < 2:
            raise Unusable(EMPTY)
        if not all(0 <= token < self.target.vocab_size for token in (*prompt, *text)):
            raise Unusable(OUTSIDE)
        context, length = self.target.context_length, len(prompt) + len(text)
        if self.max_prompt_length is not None and len(prompt) > self.max_prompt_length:
            raise Unusable(TOO_LONG, f"a prompt of {len(prompt)} tokens")
        if context is not None and length > context:
            raise Unusable(TOO_LONG, f"{length} tokens, and the target knows {context} positions")
        key = hashlib.sha256(f"{prompt}{text}".encode()).digest()[:16]
        if key in self._seen:
            raise Unusable(SEEN)
        self._seen.add(key)
        return Row(hashlib.sha256(turn.opening.encode(errors="replace")).digest()[:16], prompt, text)

    def _ids(self, turn: Turn) -> tuple[list[int], list[int]]:
        """Prompt and answer as token ids: the server's own where the log has them, else as the template has it."""
        own = check_value("chat_template_kwargs", turn.chat_template_kwargs, dict, CHAT_KWARGS)
        kwargs, tools = {**self.kwargs, **own}, read_tools(turn.tools)
        messages = isinstance(turn.prompt, list)
        if messages:
            check_rendered(read_messages(turn.prompt), self.tokenizer, kwargs, tools, self._tried)
        start = turn.prompt_ids
        if start is None:
            start = prompt_ids(turn.prompt, self.tokenizer, kwargs, tools)
        if turn.completion_ids is not None:
            end = None
            if not turn.open_end and turn.completion_ids[-1:] not in [[stop] for stop in self.stops]:
                # Engines leave it out.
                end = end_of_turn(self.tokenizer, kwargs) if messages else self.tokenizer.eos_token_id
            return start, [*turn.completion_ids, *([] if end is None else [end])]
        if messages and isinstance(turn.answer, dict):
            return start, self._templated(turn, kwargs, tools)
        plain = turn.answer if isinstance(turn.answer, str) else turn.answer["content"] or ""
        return start, completion_ids(turn.prompt, plain, self.tokenizer, kwargs, tools)

    def _templated(self, turn: Turn, kwargs: dict[str, Any], tools: list[dict] | None) -> list[int]:
        """An answer in a message, as the template writes it behind its prompt."""
        (answer,) = read_messages([turn.answer])
        more = answer.keys() & {"reasoning_content", "tool_calls"}
        if not (answer["content"] or more):
            raise Unusable(EMPTY)
        start = prompt_ids(turn.prompt, self.tokenizer, kwargs, tools)
        whole = templated([*read_messages(turn.prompt), answer], self.tokenizer, kwargs, tools)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        if more:
            raise Unusable(REWRITTEN, "it writes the prompt otherwise once the answer follows")
        # The words alone are what a server wrote behind the prompt; whether they are, the target says.
        return completion_ids(turn.prompt, answer["content"], self.tokenizer, kwargs, tools)

    def _judged(self, waiting: list[tuple[str, Row]]) -> Iterator[Row]:
        """The rows among them that the target wrote."""
        if not waiting:
            return
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for _, row in waiting]
        order = sorted(range(len(waiting)), key=lengths.__getitem__)
        texts = [waiting[index][1] for index in order]
        rollout = Rollout.from_ids(
            [row.prompt_ids for row in texts],
            [row.completion_ids for row in texts],
            self.pad_token_id,
            self.target.device,
        )
        fit = text_fit(self.target, rollout, self.sampling)
        own = dict(zip(order, fit.is_targets().tolist(), strict=True))
        self._strangers.extend(fit[at : at + 1] for at, index in enumerate(order) if not own[index])
        for index, (place, row) in enumerate(waiting):
            if own[index]:
                self.tally.kept += 1
                self.tally.cut_short += row.completion_ids[-1] not in self.stops
                yield row
            else:
                self.tally.drop(place, Unusable(STRANGE))


class HeldOut:
    """
    Keeps some conversations aside, whole: all rows of one are on one side, wherever in the log they stand.

    They are those whose opening has the smallest hash, so which they are does not depend on the order of the log.

    Args:
        count (`int`): Conversations to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._kept: dict[bytes, list[Row]] = {}
        self._largest: list[int] = []  # a heap of the hashes that are kept, negated

    def sift(self, row: Row) -> list[Row]:
        """Take a row in, and give back those that are not to be held out after all."""
        if row.conversation in self._kept:
            self._kept[row.conversation].append(row)
            return []
        rank = -int.from_bytes(row.conversation, "big")
        if len(self._kept) < self.count:
            heapq.heappush(self._largest, rank)
            self._kept[row.conversation] = [row]
            return []
        if not self._largest or rank < self._largest[0]:
            return [row]
        evicted = (-heapq.heapreplace(self._largest, rank)).to_bytes(16, "big")
        self._kept[row.conversation] = [row]
        return self._kept.pop(evicted)

    @property
    def rows(self) -> list[Row]:
        """What is held out."""
        return [row for rows in self._kept.values() for row in rows]
