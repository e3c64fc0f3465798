"""Prompts as a server makes them, against ours: each way to differ by its own name."""

import copy

import pytest
from conftest import tiny_tokenizer
from datasets import Dataset
from engine_server import EngineServer

from draft_opd_trl.evaluation.served_prompts import check_prompts, served_prompts
from draft_opd_trl.texts.engine_counts import EngineStats
from draft_opd_trl.texts.prompts import tokenize_dataset


ROWS = [{"prompt": [{"role": "user", "content": words}]} for words in ("abc", "the cat", "hello")]


def _check(theirs, rows=ROWS, kwargs=(), stub=None):
    """What is said of a server with that tokenizer."""
    suite, kwargs, tokenizer = Dataset.from_list(rows), dict(kwargs), tiny_tokenizer()
    ours = list(tokenize_dataset(suite, tokenizer, None, kwargs)["prompt_ids"])
    with EngineServer(None, None, theirs, kwargs=stub) as server:
        found = served_prompts(EngineStats(server.url), suite, kwargs)
    return check_prompts(ours, found, suite, tokenizer, kwargs)


def test_the_same_template_makes_the_same_prompts():
    check = _check(tiny_tokenizer(), kwargs={"enable_thinking": False})
    assert check.found is False and "the same ids of all 3 prompts" in check.said
    whole = [{"messages": [*row["prompt"], {"role": "assistant", "content": "dropped"}]} for row in ROWS]
    assert _check(tiny_tokenizer(), whole).found is False
    rows = [{**row, "chat_template_kwargs": {"enable_thinking": False}} for row in ROWS]
    assert _check(tiny_tokenizer(), rows).found is False
    assert _check(tiny_tokenizer(), [{"prompt": "plain text"}]).found is False
    assert _check(tiny_tokenizer(), [{"prompt_ids": [5, 6, 7]}]).found is False


@pytest.mark.parametrize(
    ("given", "served", "said"),
    [
        ({}, {"enable_thinking": False}, "as with `enable_thinking` false, and it is unset here"),
        ({"enable_thinking": False}, {}, "as with `enable_thinking` true, and it is false here"),
        ({"enable_thinking": True}, {"enable_thinking": 0}, "as with `enable_thinking` false, and it is true here"),
    ],
)
def test_a_switch_that_explains_the_difference_is_named(given, served, said):
    check = _check(tiny_tokenizer(), kwargs=given, stub=served)
    assert check.cause == "thinking" and check.found and said in check.said
    assert check.said.startswith("3 of 3 prompts have other ids")


def test_a_first_token_more_is_told_from_another_template():
    other = tiny_tokenizer()
    other.chat_template = "<|end|>" + other.chat_template
    check = _check(other)
    assert check.cause == "first token" and "'<|end|><|user|>' served, '<|user|>" in check.said
    other = copy.deepcopy(other)
    other.chat_template = "<|system|>x" + tiny_tokenizer().chat_template
    check = _check(other)
    assert check.cause == "template" and "row 0 parts at token 0: '<|system|>x<|user|>abc" in check.said
    other.chat_template = tiny_tokenizer().chat_template.replace("<|assistant|>", "<|assistant|> ")
    assert "row 0 parts at token 6: ' ' served, nothing here" in _check(other).said


def test_a_server_without_tokenize_is_not_judged():
    suite = Dataset.from_list(ROWS)
    assert check_prompts([[1]] * 3, None, suite, tiny_tokenizer(), {}).found is None
