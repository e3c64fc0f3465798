"""
Which logged answers become rows: those of a target whose every answer is known, in the very ids that it wrote.

After the mark of its turn the target writes "abc" and its stop token; with thinking off, "bc".
"""

import random

import pytest
import torch
from conftest import STOP, scripted_target, tiny_tokenizer

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.texts import harvest
from draft_opd_trl.texts.harvest import (
    EMPTY,
    OUTSIDE,
    REWRITTEN,
    SEEN,
    STRANGE,
    TOO_LONG,
    UNTEMPLATED,
    Harvest,
    HeldOut,
    Row,
)
from draft_opd_trl.texts.traffic import FAILED, NOT_JSON, Unusable


A, B, C = tiny_tokenizer()("abc")["input_ids"]
USER, ASSISTANT, SYSTEM, NOTHINK = 1, 2, 3, 4
ABC = [A, B, C, STOP]
GREEDY = SamplingParams()


def user(text="x"):
    return {"role": "user", "content": text}


def said(text="abc"):
    return {"role": "assistant", "content": text}


def ids(text):
    return tiny_tokenizer()(text)["input_ids"]


@pytest.fixture(scope="module")
def target():
    table = torch.zeros(len(tiny_tokenizer()), len(tiny_tokenizer()))
    for token, after in [(ASSISTANT, A), (NOTHINK, B), (A, B), (B, C), (C, STOP)]:
        table[token, after] = 10.0
    return scripted_target(table)


@pytest.fixture
def reap(target, tokenizer):
    """What a harvest makes of lines: rows as (prompt, completion), and its tally."""

    def of(*lines, sampling=GREEDY, template=None, **options):
        tokenizer.chat_template = template or tokenizer.chat_template
        harvested = Harvest(target, tokenizer, sampling, [STOP], STOP, **options)
        rows = harvested.rows((f"log:{number}", line) for number, line in enumerate(lines, start=1))
        return [(row.prompt_ids, row.completion_ids) for row in rows], harvested

    return of


def dropped(harvested):
    return {reason: entry["count"] for reason, entry in harvested.tally.dropped.items()}


def test_each_answer_of_the_targets_is_a_row(reap):
    lines = {"messages": [user(), said(), user("y"), said()]}, {"prompt": "x<|assistant|>", "completion": "abc"}
    rows, harvested = reap(*lines)
    first = [USER, *ids("x"), STOP, ASSISTANT]
    assert rows[:2] == [(first, ABC), ([*first, *ABC, USER, *ids("y"), STOP, ASSISTANT], ABC)]
    assert rows[2][1] == ABC
    assert (harvested.tally.lines, harvested.tally.answers, harvested.tally.kept) == (2, 3, 3)
    assert harvested.tally.dropped == {} and harvested.tally.cut_short == 0 and harvested.strangers() is None


def test_what_gives_no_row_is_counted_by_reason(reap):
    lines = [
        {"messages": [user(), said()]},
        {"messages": [user(), said()]},
        {"messages": [user(), said("cab")]},
        {"messages": [user("y"), said("abca")]},
        {"messages": [user("y"), said("")]},
        {"messages": [{"role": "human", "content": "x"}, said()]},
        {"messages": [user(), {"role": "assistant", "content": [{"type": "image_url"}]}]},
        {"messages": [user()], "response": {"error": {}}},
        {"prompt_ids": [5], "completion_ids": [5, 99]},
        Unusable(NOT_JSON),
    ]
    rows, harvested = reap(*lines)
    assert len(rows) == harvested.tally.kept == 1
    assert dropped(harvested) == {
        SEEN: 1, STRANGE: 2, EMPTY: 1, UNTEMPLATED: 2, FAILED: 1, OUTSIDE: 1, NOT_JSON: 1,
    }  # fmt: skip
    entry = harvested.tally.dropped[UNTEMPLATED]
    assert entry["first"] == "log:6" and "the role 'human'" in entry["detail"]
    assert harvested.tally.dropped[STRANGE]["first"] == "log:3"
    assert "of 2 texts" in harvested.strangers()
    # Each answer is one thing: a row, or one of the dropped, as is a line without any.
    assert sum(dropped(harvested).values()) + harvested.tally.kept == len(lines)


def test_text_that_was_cut_short_gets_no_stop_token(reap):
    short = {"messages": [user()], "response": {"choices": [{"message": said("ab"), "finish_reason": "length"}]}}
    rows, harvested = reap(short)
    assert [text for _, text in rows] == [[A, B]] and harvested.tally.cut_short == 1
    # As a whole answer it is none of the target's.
    rows, harvested = reap({"messages": [user(), said("ab")]})
    assert rows == [] and dropped(harvested) == {STRANGE: 1}
    # A limit of ours cuts too.
    rows, harvested = reap({"messages": [user(), said()]}, max_completion_length=2)
    assert [text for _, text in rows] == [[A, B]] and harvested.tally.cut_short == 1


def test_ids_of_the_server_are_taken_as_they_are(reap):
    def answered(**choice):
        choice = {"message": said("something else"), "finish_reason": "stop", **choice}
        return {"messages": [user()], "response": {"prompt_token_ids": [ASSISTANT], "choices": [choice]}}

    # Engines leave the stop token out or not, and a text that was cut short has none.
    assert reap(answered(token_ids=[A, B, C]))[0] == reap(answered(token_ids=ABC))[0] == [([ASSISTANT], ABC)]
    assert reap(answered(token_ids=[A, B], finish_reason="length"))[0] == [([ASSISTANT], [A, B])]
    assert reap({"prompt_ids": [ASSISTANT], "completion_ids": [A, B]})[0] == [([ASSISTANT], [A, B])]
    assert reap({"request": {"prompt": [ASSISTANT]}, "response": {"choices": [{"text": "abc"}]}})[0] == [
        ([ASSISTANT], ABC)
    ]


def test_the_requests_switches_reach_the_template(reap):
    """Off, this template's prompt ends otherwise than a conversation goes on: the words behind it are what counts."""
    off = {"messages": [user()], "chat_template_kwargs": {"enable_thinking": False}}
    prompt = [USER, *ids("x"), STOP, ASSISTANT, NOTHINK]
    rows, harvested = reap({**off, "response": said("bc")}, {**off, "response": said("abc")})
    assert rows == [(prompt, [B, C, STOP])] and dropped(harvested) == {STRANGE: 1}
    rows, _ = reap({"messages": [user()], "response": said("bc")}, chat_template_kwargs={"enable_thinking": False})
    assert rows == [(prompt, [B, C, STOP])]


# Thoughts are written in the last turn alone.
THINKING = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if loop.last and message.reasoning_content %}{{ message.reasoning_content }}{% endif %}"
    "{{ message['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# What it writes first depends on how the conversation ends.
REWRITING = "{% if messages[-1].role == 'assistant' %}<|system|>{% endif %}" + THINKING


def test_each_turn_is_seen_as_it_was_when_it_was_written(reap):
    thought = {"role": "assistant", "content": "c", "reasoning_content": "ab"}
    lines = {"messages": [user(), thought, user("y"), thought]}
    rows, harvested = reap(lines, template=THINKING)
    first = [USER, *ids("x"), STOP, ASSISTANT]
    assert rows == [(first, ABC), ([*first, C, STOP, USER, *ids("y"), STOP, ASSISTANT], ABC)]
    # Without its thoughts an answer is not what the target wrote.
    rows, harvested = reap({"messages": [user(), said("c")]}, template=THINKING)
    assert rows == [] and dropped(harvested) == {STRANGE: 1}


def test_a_template_that_rewrites_what_is_before_leaves_only_plain_answers(reap):
    thought = {"role": "assistant", "content": "c", "reasoning_content": "ab"}
    rows, harvested = reap({"messages": [user(), thought]}, {"messages": [user(), said()]}, template=REWRITING)
    assert rows == [([USER, *ids("x"), STOP, ASSISTANT], ABC)]
    assert dropped(harvested) == {REWRITTEN: 1}


def test_tools_reach_the_template(reap):
    template = "{% for tool in tools or [] %}<|system|>{{ tool.name }}{% endfor %}" + THINKING
    rows, _ = reap({"messages": [user(), said()], "tools": [{"name": "add"}]}, template=template)
    assert rows == [([SYSTEM, *ids("add"), USER, *ids("x"), STOP, ASSISTANT], ABC)]
    rows, harvested = reap({"messages": [user(), said()], "tools": [{"name": "add"}]}, template=THINKING)
    assert rows == [] and "writes nothing of `tools`" in harvested.tally.dropped[UNTEMPLATED]["detail"]


def test_what_a_template_cannot_take_costs_one_answer(reap):
    called = "{% for call in message.tool_calls or [] %}{% for _, value in call.function.arguments | items %}"
    said_first = "{{ message['content'] }}"
    template = THINKING.replace(said_first, called + "{{ value }}{% endfor %}{% endfor %}" + said_first)

    def calls(arguments):
        called = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        return {"messages": [user(), {"role": "assistant", "content": "c", "tool_calls": [called]}]}

    rows, harvested = reap(calls('{"x": "ab"}'), calls('{"x": "a'), template=template)
    assert [text for _, text in rows] == [ABC] and dropped(harvested) == {UNTEMPLATED: 1}
    rows, harvested = reap({"messages": [user(), said()], "chat_template_kwargs": {"tokenize": False}})
    assert dropped(harvested) == {UNTEMPLATED: 1}


def test_lengths(reap, target, monkeypatch):
    line = {"messages": [user("xxxx"), said()]}
    assert len(reap(line, max_prompt_length=7)[0]) == 1
    rows, harvested = reap(line, max_prompt_length=6)
    assert rows == [] and harvested.tally.dropped[TOO_LONG]["detail"] == "a prompt of 7 tokens"
    monkeypatch.setattr(target.config, "max_position_embeddings", 10)
    assert dropped(reap(line)[1]) == {TOO_LONG: 1}


def test_the_stated_law_judges(tokenizer):
    """Greedy text is too cool for a law that draws."""
    table = torch.zeros(32, 32)
    table[:, A] = 1.0
    line = "log:1", {"prompt_ids": [A], "completion_ids": [A] * 60}
    for law, kept in [(GREEDY, 1), (SamplingParams(1.0), 0)]:
        harvested = Harvest(scripted_target(table), tokenizer, law, [STOP], STOP)
        assert len(list(harvested.rows([line]))) == kept


def test_windows_change_nothing(reap, monkeypatch):
    draws = random.Random(0)
    lines = [{"messages": [user("x" * draws.randint(1, 30)), said(draws.choice(["abc", "cab"]))]} for _ in range(40)]
    kept, whole = reap(*lines)
    monkeypatch.setattr(harvest, "WINDOW", 3)
    again, parts = reap(*lines)
    assert again == kept and dropped(parts) == dropped(whole) and len(kept) > 5


def test_conversations_are_held_out_whole_whatever_the_order():
    rows = [Row(bytes([0] * 15 + [place % 10]), [place], [place]) for place in range(50)]
    sides = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        aside = HeldOut(3)
        given = [ready for row in rows for ready in aside.sift(row)]
        assert sorted(row.prompt_ids[0] for row in [*given, *aside.rows]) == list(range(50))
        sides.append({row.conversation for row in aside.rows})
        assert sides[-1].isdisjoint(row.conversation for row in given) and len(aside.rows) == 15
    assert sides == [{bytes([0] * 15 + [place]) for place in range(3)}] * 3
    assert [HeldOut(0).sift(row) for row in rows] == [[row] for row in rows]
