"""Data-set rows to token ids: plain and conversational, thinking on and off, tools, limits, and every error."""

import logging

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from draft_opd_trl.texts.prompts import (
    check_columns,
    check_fit,
    completion_ids,
    prompt_ids,
    tokenize_dataset,
    warn_of_open_ends,
)


# The tiny tokenizer: <|end|> 0, <|user|> 1, <|assistant|> 2, <|system|> 3, <|nothink|> 4, then a = 5, b = 6, c = 7 …
USER = [{"role": "user", "content": "ab"}]
ANSWER = [{"role": "assistant", "content": "c"}]


def test_plain_text(tokenizer):
    assert prompt_ids("abc", tokenizer) == [5, 6, 7]


def test_messages_get_a_generation_prompt(tokenizer):
    assert prompt_ids(USER, tokenizer) == [1, 5, 6, 0, 2]
    system = [{"role": "system", "content": "c"}, *USER]
    assert prompt_ids(system, tokenizer) == [3, 7, 0, 1, 5, 6, 0, 2]


def test_thinking_switch(tokenizer):
    assert prompt_ids(USER, tokenizer, {"enable_thinking": True}) == [1, 5, 6, 0, 2]
    assert prompt_ids(USER, tokenizer, {"enable_thinking": False}) == [1, 5, 6, 0, 2, 4]


@pytest.mark.parametrize("prompt", [7, None, [], ["ab"], [{"content": "ab"}], {"role": "user"}])
def test_a_prompt_of_another_kind(tokenizer, prompt):
    with pytest.raises(TypeError, match="must be a string or a list of messages with 'role' and 'content'"):
        prompt_ids(prompt, tokenizer)


def test_completions(tokenizer):
    # Plain text gets the stop token, once.
    assert completion_ids("ab", "ca", tokenizer) == completion_ids("ab", "ca<|end|>", tokenizer) == [7, 5, 0]
    # What the template writes after the prompt, stop token included.
    assert completion_ids(USER, ANSWER, tokenizer) == [7, 0]


def test_a_template_that_rewrites_the_prompt(tokenizer):
    # With thinking off the generation prompt has a token that the finished conversation lacks.
    with pytest.raises(ValueError, match="chat template changes the prompt.*Store `prompt_ids` and `completion_ids`"):
        completion_ids(USER, ANSWER, tokenizer, {"enable_thinking": False})


def test_dataset_plain_and_conversational(tokenizer):
    plain = tokenize_dataset(Dataset.from_dict({"prompt": ["ab", "c"], "other": [1, 2]}), tokenizer, 8)
    assert plain.column_names == ["prompt_ids"]
    assert plain["prompt_ids"][:] == [[5, 6], [7]]
    chat = Dataset.from_dict({"prompt": [USER]})
    assert tokenize_dataset(chat, tokenizer, 8)["prompt_ids"][:] == [[1, 5, 6, 0, 2]]
    without = tokenize_dataset(chat, tokenizer, 8, {"enable_thinking": False})
    assert without["prompt_ids"][:] == [[1, 5, 6, 0, 2, 4]]


def test_dataset_of_ids_is_taken_as_it_is(tokenizer):
    rows = Dataset.from_dict({"prompt_ids": [[9, 9]], "completion_ids": [[8, 0]]})
    got = tokenize_dataset(rows, tokenizer, 8, needs_completions=True)
    assert got[0] == {"prompt_ids": [9, 9], "completion_ids": [8, 0]}


def test_dataset_with_completions(tokenizer):
    rows = Dataset.from_dict({"prompt": ["ab"], "completion": ["c"]})
    assert tokenize_dataset(rows, tokenizer, 8, needs_completions=True)[0] == {
        "prompt_ids": [5, 6],
        "completion_ids": [7, 0],
    }
    assert tokenize_dataset(rows, tokenizer, 8)[0] == {"prompt_ids": [5, 6]}


def test_the_limit_is_inclusive(tokenizer):
    rows = Dataset.from_dict({"prompt": ["abc"]})
    assert tokenize_dataset(rows, tokenizer, 3)["prompt_ids"][:] == [[5, 6, 7]]
    assert tokenize_dataset(rows, tokenizer, None)["prompt_ids"][:] == [[5, 6, 7]]
    with pytest.raises(
        ValueError, match="Row 0 of `train_dataset` has a prompt of 3 tokens, more than max_prompt_length=2. Raise"
    ):
        tokenize_dataset(rows, tokenizer, 2)


def test_truncation_keeps_the_last_tokens(tokenizer):
    rows = Dataset.from_dict({"prompt": ["abc", "a"]})
    assert tokenize_dataset(rows, tokenizer, 2, truncate_prompts=True)["prompt_ids"][:] == [[6, 7], [5]]


def test_empty_prompts_and_completions(tokenizer):
    with pytest.raises(ValueError, match="Row 1 of `eval_dataset` has an empty prompt; remove it"):
        tokenize_dataset(Dataset.from_dict({"prompt": ["a", ""]}), tokenizer, 8, name="eval_dataset")
    rows = Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", ""]})
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` has an empty completion; remove it"):
        tokenize_dataset(rows, tokenizer, 8, needs_completions=True)


def test_empty_dataset():
    with pytest.raises(ValueError, match="`eval_dataset` is empty; it needs at least one row"):
        check_columns(Dataset.from_dict({"prompt": []}), False, "eval_dataset")


def test_unknown_columns():
    with pytest.raises(ValueError, match=r"has the columns \['question'\], none of which is 'prompt'.*rename_column"):
        check_columns(Dataset.from_dict({"question": ["a"]}), False, "train_dataset")


def test_missing_completions():
    rows = Dataset.from_dict({"prompt": ["a"]})
    check_columns(rows, False, "train_dataset")
    with pytest.raises(
        ValueError,
        match="rollout_source='dataset' reads texts.*'completion_ids' or 'messages'. Add",
    ):
        check_columns(rows, True, "train_dataset")


def test_a_stream_is_refused():
    stream = Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    with pytest.raises(TypeError, match="is a IterableDataset; prompts must be a `datasets.Dataset`"):
        check_columns(stream, False, "train_dataset")


# -- whole conversations -------------------------------------------------------------------------------------------

CONVERSATION = [*USER, *ANSWER, {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]


@pytest.fixture
def warnings(caplog):
    """What was warned of, as one text."""
    logging.getLogger("draft_opd_trl").addHandler(caplog.handler)
    yield lambda: " ".join(record.getMessage() for record in caplog.records)
    logging.getLogger("draft_opd_trl").removeHandler(caplog.handler)


def test_a_prompt_that_ends_with_an_answer_is_refused(tokenizer):
    rows = Dataset.from_dict({"prompt": [USER, CONVERSATION]})
    with pytest.raises(ValueError, match="Row 1 of `train_dataset`: The prompt ends with an assistant's turn .'e'"):
        tokenize_dataset(rows, tokenizer, None)
    # Nor does renaming lead around it: 'messages' is its own column.
    with pytest.raises(ValueError, match="'messages' .whole conversations, answers included"):
        check_columns(rows.rename_column("prompt", "conversation"), False, "train_dataset")


def test_the_last_answer_of_a_conversation_is_dropped_where_the_target_writes(tokenizer, warnings):
    rows = Dataset.from_dict({"messages": [CONVERSATION, USER]})
    got = tokenize_dataset(rows, tokenizer, None)
    assert got["prompt_ids"][:] == [[1, 5, 6, 0, 2, 7, 0, 1, 8, 0, 2], [1, 5, 6, 0, 2]]
    assert "1 of 2 conversations end with an answer" in warnings()


def test_every_answer_of_a_conversation_teaches_where_it_is_the_targets(tokenizer, warnings):
    rows = Dataset.from_dict({"messages": [CONVERSATION, [*USER, *ANSWER]]})
    got = tokenize_dataset(rows, tokenizer, None, needs_completions=True)
    assert got[:] == {
        "prompt_ids": [[1, 5, 6, 0, 2], [1, 5, 6, 0, 2, 7, 0, 1, 8, 0, 2], [1, 5, 6, 0, 2]],
        "completion_ids": [[7, 0], [9, 0], [7, 0]],
    }
    assert "each answer of an assistant is a row: 3 of 2 conversations" in warnings()
    with pytest.raises(ValueError, match="Row 0 of `train_dataset`: The conversation has no answer"):
        tokenize_dataset(Dataset.from_dict({"messages": [USER]}), tokenizer, None, needs_completions=True)


def test_a_text_that_is_there_twice_is_refused(tokenizer):
    rows = Dataset.from_dict({"prompt": ["ab"], "messages": [CONVERSATION]})
    with pytest.raises(ValueError, match="has the column 'messages' beside .'prompt'.*remove_columns"):
        tokenize_dataset(rows, tokenizer, None)


@pytest.mark.parametrize(
    "completion", [USER, [*ANSWER, *USER, *ANSWER], [{"role": "tool", "content": "a"}]], ids=["user", "many", "tool"]
)
def test_a_completion_in_messages_is_one_answer(tokenizer, completion):
    with pytest.raises(ValueError, match="is one message of the assistant after messages"):
        completion_ids(USER, completion, tokenizer)
    with pytest.raises(ValueError, match="after a prompt of type str"):
        completion_ids("ab", ANSWER, tokenizer)


# -- switches of single rows ---------------------------------------------------------------------------------------


def test_a_row_has_switches_of_its_own(tokenizer):
    rows = Dataset.from_list(
        [{"prompt": USER, "chat_template_kwargs": {"enable_thinking": value}} for value in (None, False)]
    )
    assert tokenize_dataset(rows, tokenizer, None)["prompt_ids"][:] == [[1, 5, 6, 0, 2], [1, 5, 6, 0, 2, 4]]


# -- where texts begin and end -------------------------------------------------------------------------------------


def test_plain_completions_end_with_a_stop_token(tokenizer, warnings):
    rows = Dataset.from_dict({"prompt": ["ab", "c"], "completion": ["c", "d"]})
    got = tokenize_dataset(rows, tokenizer, None, needs_completions=True)
    assert got["completion_ids"][:] == [[7, 0], [8, 0]]
    assert "2 completions are plain text, and each is ended with a stop token" in warnings()


def test_the_first_token_of_a_text_is_not_written_twice(tokenizer):
    tokenizer.bos_token = "<|system|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|system|> $A", None, [("<|system|>", 3)])
    assert tokenizer("ab")["input_ids"] == [3, 5, 6]
    assert prompt_ids("ab", tokenizer) == prompt_ids("<|system|>ab", tokenizer) == [3, 5, 6]


def test_a_tokenizer_that_ends_prompts_is_refused(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <|end|>", None, [("<|end|>", 0)])
    with pytest.raises(ValueError, match="puts '<|end|>' behind a prompt"):
        prompt_ids("ab", tokenizer)


def test_open_ends_are_warned_of(warnings):
    rows = Dataset.from_dict({"completion_ids": [[5, 0, 6], [5, 6], [5, 6, 7]]})
    warn_of_open_ends(rows, [0, 9], 3, "train_dataset")
    assert "1 of 3 completions hold none of the target's stop tokens [0, 9]" in warnings()


@pytest.mark.parametrize("ids", [[1.0, 2.5], [-1, 3], ["a", "b"], "ab"], ids=["float", "negative", "text", "string"])
@pytest.mark.parametrize("column", ["prompt_ids", "completion_ids"])
def test_ids_that_are_none(tokenizer, ids, column):
    rows = {"prompt_ids": [1], "completion_ids": [2], column: ids}
    with pytest.raises(TypeError, match=f"Row 0 of `train_dataset`: `{column}` is .*integers from 0 up"):
        tokenize_dataset(Dataset.from_list([rows]), tokenizer, None, needs_completions=True)


@pytest.mark.parametrize(
    ("ids", "taken"), [([3.0, 4.0], [3, 4]), (3, None), (True, None), ([0.5], None), ([3.0, 4.5], None)]
)
def test_ids_of_a_column_of_fractions(tokenizer, ids, taken):
    """One fraction in a file makes its whole column one of fractions, whose other rows are right."""
    if taken is None:
        with pytest.raises(TypeError, match="`prompt_ids` is .* must be a list of token ids"):
            tokenize_dataset(Dataset.from_list([{"prompt_ids": ids}]), tokenizer, None)
    else:
        assert tokenize_dataset(Dataset.from_list([{"prompt_ids": ids}]), tokenizer, None)["prompt_ids"][0] == taken


def test_what_does_not_fit_the_target():
    rows = Dataset.from_dict({"prompt_ids": [[1, 2], [3]], "completion_ids": [[4], [5, 47]]})
    check_fit({"train_dataset": rows}, 48, 16, 10, 4)
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` has the token id 47 in `completion_ids`.*at 46"):
        check_fit({"train_dataset": rows}, 47, None, 10, 4)
    with pytest.raises(ValueError, match="needs 17 positions .2 of its longest prompt, 11 of a completion, 4 of"):
        check_fit({"eval_dataset": rows}, 48, 16, 11, 4)
