"""Data-set rows to token ids: plain and conversational, thinking on and off, limits, and every error."""

import pytest
from datasets import Dataset

from draft_opd_trl.prompts import check_columns, completion_ids, prompt_ids, tokenize_dataset


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


def test_messages_without_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template. Set `tokenizer.chat_template`, or give plain"):
        prompt_ids(USER, tokenizer)
    assert prompt_ids("ab", tokenizer) == [5, 6]


def test_completions(tokenizer):
    assert completion_ids("ab", "ca", tokenizer) == [7, 5]
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
        "completion_ids": [7],
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
    with pytest.raises(ValueError, match="rollout_source='dataset' reads texts.*'completion_ids'. Add one, or use"):
        check_columns(rows, True, "train_dataset")


def test_a_stream_is_refused():
    stream = Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset()
    with pytest.raises(TypeError, match="is a IterableDataset; prompts must be a `datasets.Dataset`"):
        check_columns(stream, False, "train_dataset")
