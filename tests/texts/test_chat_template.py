"""What a chat template writes of messages, roles and tools; and what it would pass over without a word."""

import json

import pytest
from datasets import Dataset

from draft_opd_trl.texts.chat_template import check_rendered, end_of_turn
from draft_opd_trl.texts.prompts import completion_ids, prompt_ids, tokenize_dataset


# The tiny tokenizer: <|end|> 0, <|user|> 1, <|assistant|> 2, <|system|> 3, <|nothink|> 4, then a = 5, b = 6, c = 7 …
USER = [{"role": "user", "content": "ab"}]
ANSWER = [{"role": "assistant", "content": "c"}]


def test_parts_of_text_are_text_and_others_are_refused(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert prompt_ids([{"role": "user", "content": parts}], tokenizer) == prompt_ids(USER, tokenizer)
    for content in (None, 3, ["ab"], [{"type": "text", "text": None}]):
        with pytest.raises(ValueError, match="of role 'user' has the content .* must be text, or a list of parts"):
            prompt_ids([{"role": "user", "content": content}], tokenizer)


def test_images_are_refused_without_being_shown(tokenizer):
    """Named with their row, from every column that holds messages."""
    image = {"type": "image_url", "image_url": {"url": "data:" + "x" * 10_000}}
    shown = [{"role": "user", "content": [{"type": "text", "text": "a"}, image]}]
    plain, answer = ([{"role": role, "content": [{"type": "text", "text": "b"}]}] for role in ("user", "assistant"))
    for rows in (
        [{"prompt": plain}, {"prompt": shown}],
        [{"messages": [*plain, *answer]}, {"messages": [*shown, *answer]}],
    ):
        with pytest.raises(ValueError, match="Row 1 of .*'user' has parts of type image_url.* Drop such rows") as told:
            tokenize_dataset(Dataset.from_list(rows), tokenizer, None)
        assert len(str(told.value)) < 400


def test_what_arrow_fills_in_is_not_said(tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{% if 'name' in message %}z{% endif %}{{ message['content'] }}{% endfor %}"
    )
    rows = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "a", "name": "b"}]]
    assert tokenize_dataset(Dataset.from_dict({"prompt": rows}), tokenizer, None)["prompt_ids"][:] == [[5], [30, 5]]


def test_roles_that_the_template_does_not_know(tokenizer):
    """Written by none, or refused by the template itself: with the row, and in one line."""
    rows = Dataset.from_dict({"prompt": [USER, [{"role": "tool", "content": "a"}]]})
    tokenizer.chat_template = "{% for turn in messages if turn['role'] == 'user' %}{{ turn['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="Row 1 of `train_dataset`: The chat template writes nothing of .* 'tool'"):
        tokenize_dataset(rows, tokenizer, None)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="Row 0 of .*refuses a conversation of the roles user: roles must alternate"):
        tokenize_dataset(rows, tokenizer, None)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}<|system|>{{ tool['function']['name'] }}<|end|>{% endfor %}{% endif %}"
)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["schemas", "json"])
def test_tools_are_written(tokenizer, tools):
    tokenizer.chat_template = WITH_TOOLS + tokenizer.chat_template
    rows = Dataset.from_list([{"prompt": USER, "completion": ANSWER, "tools": tools}])
    got = tokenize_dataset(rows, tokenizer, None, needs_completions=True)[0]
    assert got == {"prompt_ids": [3, 5, 8, 8, 0, 1, 5, 6, 0, 2], "completion_ids": [7, 0]}


def test_tools_that_would_be_lost_are_refused(tokenizer):
    rows = Dataset.from_list([{"prompt": USER, "tools": [TOOL]}])
    with pytest.raises(ValueError, match="Row 0 of .*writes nothing of `tools`.*or remove the column"):
        tokenize_dataset(rows, tokenizer, None)
    with pytest.raises(ValueError, match="`tools` stand beside a prompt of plain text"):
        prompt_ids("ab", tokenizer, tools=[TOOL])
    with pytest.raises(ValueError, match="`tools` is '.add', which is not JSON"):
        prompt_ids(USER, tokenizer, tools="[add")
    with pytest.raises(TypeError, match="must be a list of JSON schemas"):
        prompt_ids(USER, tokenizer, tools=["add"])


def test_roles_of_other_formats_are_refused(tokenizer):
    with pytest.raises(ValueError, match="role 'human'.*Call it 'user'"):
        tokenize_dataset(Dataset.from_list([{"prompt": [{"role": "human", "content": "hi"}]}]), tokenizer, None)


def test_plain_completions_after_messages_end_as_the_template_ends(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|nothink|> <|end|>")
    assert completion_ids(USER, "c", tokenizer) == [7, 4]
    assert completion_ids("ab", "c", tokenizer) == [7, 0]


def test_messages_without_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template. Set `tokenizer.chat_template`, or give plain"):
        prompt_ids(USER, tokenizer)
    assert prompt_ids("ab", tokenizer) == [5, 6]


def test_each_role_and_the_tools_are_tried_once(tokenizer, monkeypatch):
    """Of a large data set, as each try writes the conversation twice."""
    asked, written = [], tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: (asked.append(a), written(*a, **k))[1])
    tried = {"assistant"}
    for _ in range(3):
        check_rendered([*USER, *ANSWER], tokenizer, None, None, tried)
    assert tried == {"assistant", "user"} and len(asked) == 2


def test_the_end_of_a_turn_is_the_first_special_token_behind_it(tokenizer):
    assert end_of_turn(tokenizer, None) == 0
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}ab<|system|><|end|>{% endfor %}"
    assert end_of_turn(tokenizer, None) == 3
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}ab{% endfor %}"
    assert end_of_turn(tokenizer, None) == tokenizer.eos_token_id
