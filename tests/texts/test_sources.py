"""Texts from every source are the target's, and what is on disk is not written again."""

import pytest
import torch
from conftest import HELD_OUT, POCKET, ScriptedDrafter, counting_target, scripted_target
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, stop_token_ids
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.sources import CachedSource, DatasetSource, DecodingSource, until_stop
from draft_opd_trl.texts.text_cache import TextCache


SETTINGS = SpeculationSettings(4, [7], keep_states=True, pad_token_id=9)
ROWS = [{"prompt_ids": [1, 2], "completion_ids": [3, 4, 5, 6, 7]}, {"prompt_ids": [5], "completion_ids": [6, 7, 8]}]


def sources():
    drafter = ScriptedDrafter([[token + 1, 0] for token in range(12)])
    return {
        "speculation": DecodingSource(counting_target(), drafter, SETTINGS, 0),
        "generate": DecodingSource(counting_target(), None, SETTINGS, 0),
        "dataset": DatasetSource(counting_target(), SETTINGS),
    }


@pytest.mark.parametrize("name", sorted(sources()))
def test_every_source_gives_the_same_text(name):
    rollout = sources()[name].write(ROWS)
    # Texts of the data set end where generated ones do: at `max_new_tokens`, or with the first stop token.
    assert rollout.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 9, 9, 9]]
    assert rollout.prompt_lengths.tolist() == [2, 1] and rollout.lengths.tolist() == [6, 3]
    assert (rollout.blocks is not None) == (name == "speculation")
    assert (rollout.block_states is not None) == (name == "speculation")


def test_until_stop():
    assert until_stop([1, 2, 3], [7, 8]) == [1, 2, 3]
    assert until_stop([1, 8, 2, 7], [7, 8]) == [1, 8]
    assert until_stop([], [7]) == []


def test_draws_depend_on_seed_draw_and_prompts_alone():
    settings = SpeculationSettings(12, [], SamplingParams(1.0))
    target = scripted_target(torch.zeros(8, 8))  # every token is as likely as any, whatever the prompt

    def texts(seed=0, draw=0, prompt=1):
        return DecodingSource(target, None, settings, seed).write([{"prompt_ids": [prompt]}], draw).completions()

    assert texts() == texts()
    assert texts() not in (texts(draw=1), texts(seed=1), texts(prompt=2))


class Counting:
    """A source that remembers what it was asked for."""

    def __init__(self, source):
        self.source, self.asked = source, []

    def write(self, rows, draw=0):
        self.asked.append(([row["prompt_ids"] for row in rows], draw))
        return self.source.write(rows, draw)


def cached(folder, source, log=lambda *logged: None):
    return CachedSource(source, TextCache(folder, {}), log, 9, torch.device("cpu"))


def test_a_cache_asks_only_for_what_it_lacks(tmp_path):
    inner, logged = Counting(sources()["speculation"]), []
    source = cached(tmp_path, inner, lambda *counts: logged.append(counts))
    first = source.write(ROWS[:1])
    assert first.blocks is not None and first.block_states is not None  # untouched on the way
    both = source.write(ROWS)
    # Texts from disk have no blocks, and replay finds them.
    assert both.blocks is None and both.tokens.tolist() == sources()["generate"].write(ROWS).tokens.tolist()
    assert both.lengths.tolist() == [6, 3]
    assert source.write(ROWS[::-1]).completions() == both.completions()[::-1]
    source.write(ROWS[:1], draw=1)
    assert inner.asked == [([[1, 2]], 0), ([[5]], 0), ([[1, 2]], 1)]
    assert logged == [("rollout/cached", *counts) for counts in ((0, 1), (1, 2), (2, 2), (0, 1))]


def test_texts_are_written_ahead_once_and_counted_by_nobody(tmp_path):
    inner, logged = Counting(sources()["generate"]), []
    source = cached(tmp_path, inner, lambda *counts: logged.append(counts))
    source.fill(ROWS[:1])
    source.fill(ROWS)
    source.fill(ROWS)
    assert inner.asked == [([[1, 2]], 0), ([[5]], 0)] and logged == []
    assert source.write(ROWS).completions() == sources()["generate"].write(ROWS).completions()
    assert len(inner.asked) == 2


def test_conversational_rows_are_the_texts_they_came_from():
    """What the template writes behind the stop token is not the target's, and is cut."""
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    prompts = load_dataset("json", data_files=HELD_OUT, split="train[:6]")
    settings = SpeculationSettings(300, stop_token_ids(model, tokenizer))
    rows = list(tokenize_dataset(prompts, tokenizer, None))
    written = DecodingSource(Target(model), None, settings, 0).write(rows).completions()
    answers = [[{"role": "assistant", "content": tokenizer.decode(ids[:-1])}] for ids in written]
    chats = prompts.select_columns("prompt").add_column("completion", answers)
    rows = list(tokenize_dataset(chats, tokenizer, None, needs_completions=True))
    assert rows[0]["completion_ids"] == [*written[0], *tokenizer("\n")["input_ids"]]
    assert DatasetSource(Target(model), settings).write(rows).completions() == written
