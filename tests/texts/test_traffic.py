"""What is found in logs: every form that servers and proxies write, and why a line gives nothing."""

import gzip
import json

import pytest

from draft_opd_trl.core.errors import EnvironmentFault, InputError, NotFoundError
from draft_opd_trl.texts.traffic import FAILED, NO_ANSWER, NOT_JSON, UNKNOWN, Unusable, check_logs, read_log, turns_of


USER = {"role": "user", "content": "2 + 2?"}
FOUR = {"role": "assistant", "content": "4"}
MORE = {"role": "user", "content": "And 3 + 3?"}
SIX = {"role": "assistant", "content": "6"}
CHAT = {"messages": [USER, FOUR, MORE, SIX]}


def request(choice, **more):
    return {"request": {"messages": [USER], **more}, "response": {"choices": [choice]}}


def stopped(message=FOUR, **more):
    return {"message": message, "finish_reason": "stop", **more}


def only(row):
    (turn,) = turns_of(row)
    return turn


def test_each_answer_of_a_conversation_is_one_with_all_before_it():
    turns = turns_of({**CHAT, "tools": [{"name": "add"}], "chat_template_kwargs": {"enable_thinking": False}})
    assert [turn.prompt for turn in turns] == [[USER], [USER, FOUR, MORE]]
    assert [turn.answer for turn in turns] == [FOUR, SIX]
    assert all(turn.tools == [{"name": "add"}] for turn in turns)
    assert all(turn.chat_template_kwargs == {"enable_thinking": False} for turn in turns)
    # An answer that opens a conversation answers nothing.
    assert only({"messages": [FOUR, MORE, SIX]}).prompt == [FOUR, MORE]


@pytest.mark.parametrize(
    "row",
    [
        request(stopped()),
        {
            "request": {"body": {"messages": [USER]}},
            "response": {"status_code": 200, "body": {"choices": [stopped()]}},
        },
        {"request": json.dumps({"messages": [USER]}), "response": json.dumps({"choices": [stopped()]})},
        {"messages": [USER], "response": {"choices": [stopped()]}},
        {"prompt": [USER], "response": FOUR},
        {"prompt": [USER], "completion": [FOUR]},
        {"messages": [USER, FOUR]},
    ],
)
def test_the_same_answer_in_all_forms(row):
    turn = only(row)
    assert (turn.prompt, turn.answer, turn.open_end) == ([USER], FOUR, False)
    assert turn.prompt_ids is None and turn.completion_ids is None


def test_a_request_gives_its_earlier_answers_too_and_every_choice():
    row = {"request": {"messages": [USER, FOUR, MORE], "n": 2}, "response": {"choices": [stopped(SIX), stopped(FOUR)]}}
    assert [(len(turn.prompt), turn.answer) for turn in turns_of(row)] == [(1, FOUR), (3, SIX), (3, FOUR)]


def test_plain_text_and_its_ids():
    text = only({"request": {"prompt": "2 + 2 ="}, "response": {"choices": [{"text": " 4", "finish_reason": "stop"}]}})
    assert (text.prompt, text.answer) == ("2 + 2 =", " 4")
    assert only({"prompt": "2 + 2 =", "response": " 4"}).answer == " 4"
    # A response that only looks like JSON is an answer.
    assert only({"prompt": "Write JSON.", "response": "{so"}).answer == "{so"
    choice = {"text": " 4", "token_ids": [4, 5], "finish_reason": "stop"}
    both = only({"request": {"prompt": [1, 2]}, "response": {"choices": [choice]}})
    assert (both.prompt, both.prompt_ids, both.completion_ids, both.open_end) == (None, [1, 2], [4, 5], False)
    told = only({**request(stopped(token_ids=[4])), "response": {"prompt_token_ids": [1], "choices": [stopped()]}})
    assert told.prompt_ids == [1] and told.prompt == [USER]
    rows = only({"prompt_ids": [1], "completion_ids": [2, 3]})
    assert (rows.prompt_ids, rows.completion_ids, rows.open_end) == ([1], [2, 3], True)


@pytest.mark.parametrize(
    ("choice", "asked", "open_end"),
    [
        ({"finish_reason": "stop"}, {}, False),
        ({"finish_reason": "tool_calls"}, {}, False),
        ({"finish_reason": "length"}, {}, True),
        ({"finish_reason": "abort"}, {}, True),
        ({}, {}, False),
        # A stop string ends a text without a stop token; vLLM says which ended it, and others do not.
        ({"finish_reason": "stop"}, {"stop": ["\n"]}, True),
        ({"finish_reason": "stop", "stop_reason": "\n"}, {"stop": ["\n"]}, True),
        ({"finish_reason": "stop", "stop_reason": None}, {"stop": ["\n"]}, False),
        ({"finish_reason": "stop", "stop_reason": 7}, {"stop": ["\n"]}, False),
    ],
)
def test_what_was_cut_short_has_an_open_end(choice, asked, open_end):
    assert only(request({"message": FOUR, **choice}, **asked)).open_end is open_end


def test_messages_are_made_what_templates_know():
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    sent = {
        "role": "assistant",
        "content": None,
        "reasoning": "Hm.",
        "tool_calls": [call],
        "refusal": None,
        "audio": 1,
    }
    answer = only(request(stopped(sent))).answer
    called = {**call, "function": {"name": "add", "arguments": {"a": 2}}}
    assert answer == {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [called]}
    broken = {**call, "function": {"name": "add", "arguments": '{"a": '}}
    assert only(request(stopped({**sent, "tool_calls": [broken]}))).answer["tool_calls"] == [broken]
    assert "tool_calls" not in only(request(stopped({**FOUR, "tool_calls": []}))).answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "2 + 2?"}, UNKNOWN),
        ({"request": 3}, UNKNOWN),
        ({"messages": ["hello"]}, UNKNOWN),
        ({"messages": [{"content": "x"}]}, UNKNOWN),
        ({"prompt_ids": [1], "completion_ids": "23"}, UNKNOWN),
        ({"prompt_ids": [1.5], "completion_ids": [2]}, UNKNOWN),
        ({"messages": [USER]}, NO_ANSWER),
        ({"messages": [USER], "response": None}, NO_ANSWER),
        ({"prompt": "2 + 2 ="}, NO_ANSWER),
        ({"messages": [USER], "response": {"error": {"code": 503}}}, FAILED),
        ({"messages": [USER], "response": {"choices": [{"finish_reason": "stop"}]}}, FAILED),
        ({"messages": [USER], "response": {"choices": [3]}}, FAILED),
    ],
)
def test_why_a_line_gives_nothing(row, reason):
    with pytest.raises(Unusable) as raised:
        turns_of(row)
    assert raised.value.reason == reason


def test_conversations_are_told_apart_by_their_opening():
    system = {"role": "system", "content": "Be brief."}
    first, second = turns_of(CHAT)
    assert first.opening == second.opening == only({"prompt": [USER], "response": "5"}).opening
    assert only({"messages": [system, USER, FOUR]}).opening != first.opening
    assert only({"prompt": "a", "response": "b"}).opening == only({"prompt": "a", "response": "c"}).opening
    assert (
        only({"prompt_ids": [1], "completion_ids": [2]}).opening
        != only({"prompt_ids": [2], "completion_ids": [2]}).opening
    )


def test_logs_are_read_a_line_at_a_time_zipped_or_not(tmp_path):
    lines = json.dumps(CHAT).encode() + b"\n\n{broken\n[1]\n\xff\n" + json.dumps({"prompt": "a"}).encode()
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(lines)
    zipped.write_bytes(gzip.compress(lines))
    for file in (plain, zipped):
        counted = []
        read = list(read_log([str(file)], counted.append))
        assert [place.removeprefix(f"{file}:") for place, _ in read] == ["1", "3", "4", "5", "6"]
        assert read[0][1] == CHAT and read[-1][1] == {"prompt": "a"}
        assert [line.reason for _, line in read[1:4]] == [NOT_JSON] * 3
        assert sum(counted) == file.stat().st_size
    zipped.write_bytes(gzip.compress(lines)[:-12])
    with pytest.raises(EnvironmentFault, match="b.jsonl.gz cannot be read to its end"):
        list(read_log([str(zipped)], lambda count: None))


def test_what_is_no_log_is_said_first(tmp_path):
    log, other = tmp_path / "a.jsonl", tmp_path / "a.csv"
    log.touch(), other.touch()
    check_logs([str(log)])
    with pytest.raises(NotFoundError, match=r"gone.jsonl is not a file here. Give logs, \.jsonl or \.jsonl\.gz"):
        check_logs([str(log), "gone.jsonl"])
    with pytest.raises(InputError, match="a.csv is not called"):
        check_logs([str(other)])
    with pytest.raises(InputError, match="is given twice"):
        check_logs([str(log), str(log)])
