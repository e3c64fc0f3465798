"""A server that serves the target, or something like it, is believed only so far."""

from functools import partial

import pytest
import torch
from completions_server import CompletionsServer
from conftest import ANY_KIND, STOPS, tiny_drafter, tiny_model, tiny_tokenizer
from engine_server import EngineServer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, speculate
from draft_opd_trl.core import endpoint
from draft_opd_trl.core.seeding import seed_of
from draft_opd_trl.texts import server
from draft_opd_trl.texts.engine_counts import EngineStats
from draft_opd_trl.texts.server import Answer, CompletionsClient, ServerError
from draft_opd_trl.texts.server_source import SERVED, ServerSource
from draft_opd_trl.texts.sources import CachedSource, DecodingSource
from draft_opd_trl.texts.text_cache import TextCache
from draft_opd_trl.training.rollout import _faithful_text


GREEDY = SamplingParams()
TOKENIZER = tiny_tokenizer()
LETTERS = [[5 + number % 26, 6 + number // 26, 8] for number in range(20)]


@pytest.fixture(scope="module")
def target():
    """Of these texts, some end in either stop token and some at the limit."""
    return Target(tiny_model("qwen3", vocab_size=32, seed=4))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server, "INTERVAL", 0.05)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


def serving(target, change=lambda prompt, ids: ids, sampling=GREEDY, **options):
    """A server of the target's own text, `change`d on the way."""
    settings = SpeculationSettings(20, STOPS, sampling)

    def answer(prompt):
        generator = torch.Generator().manual_seed(seed_of(prompt))
        ids = change(prompt, speculate(target, None, [prompt], settings, generator).completions()[0])
        return ids, ids[-1] in STOPS

    return CompletionsServer(answer, TOKENIZER, **options)


def source_of(url, target, keep=lambda *kept: None, log=lambda *logged: None, sampling=GREEDY):
    settings = SpeculationSettings(20, STOPS, sampling)
    client = CompletionsClient(
        url, sampling, 20, STOPS, lambda ids: _faithful_text(TOKENIZER, ids), max_retries=1, concurrency=2
    )
    return ServerSource(client, TOKENIZER, DecodingSource(target, None, settings, 0), keep, log)


def rows_of(prompts):
    return [{"prompt_ids": prompt} for prompt in prompts]


@pytest.mark.parametrize(
    ("engine", "tells"), [("vLLM", "answer"), ("vLLM", "counters"), ("vLLM", "nothing"), ("SGLang", "answer")]
)
def test_what_a_server_that_speculates_came_to_is_logged(target, engine, tells):
    logged, drafter = {}, tiny_drafter(ANY_KIND, target)
    with EngineServer(target, drafter, TOKENIZER, engine, tells) as serving:
        source = source_of(serving.url, target, log=lambda name, *count: logged.update({name: count}))
        source.make_stats = partial(EngineStats, serving.url)
        for part in (LETTERS[:8], LETTERS[8:]):
            before = list(serving.reports)
            source.write(rows_of(part))
            reports = serving.reports[len(before) :]
            counted = sum(report.tokens - 1 for report in reports), sum(len(one.accepted[0]) for one in reports)
            assert logged.pop(SERVED, None) == (None if tells == "nothing" else counted)


def test_a_server_that_shows_no_counters_still_writes(target):
    with serving(target) as server:
        source = source_of(server.url, target)
        source.make_stats = partial(EngineStats, "http://127.0.0.1:9", max_retries=0)
        assert source.write(rows_of(LETTERS)).completions() == own_texts(target, LETTERS)


def own_texts(target, prompts):
    return speculate(target, None, prompts, SpeculationSettings(20, STOPS)).completions()


@pytest.mark.parametrize(
    "shape", [{}, {"returns_ids": False}, {"takes_ids": False}], ids=["ids", "ids in, text out", "text"]
)
def test_a_server_writes_the_targets_text(target, shape):
    logged = []
    with serving(target, **shape) as server:
        source = source_of(server.url, target, log=lambda *counts: logged.append(counts))
        texts = source.write(rows_of(LETTERS)).completions()
    assert texts == own_texts(target, LETTERS)
    assert {text[-1] for text in texts} > set(STOPS)
    assert logged == [("rollout/dropped", 0, len(LETTERS))]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ids: [*ids[:-2], (ids[-2] + 1) % 32 or 5, ids[-1]],  # not what the target writes
        lambda ids: ids[: len(ids) // 2],  # ends nowhere
        lambda ids: [*ids[:4], 0, *ids[5:]],  # goes on after a stop token
    ],
    ids=["other token", "no end", "beyond its end"],
)
def test_wrong_texts_are_dropped_counted_and_written_by_the_target(target, wrong):
    whole = own_texts(target, LETTERS)
    bad = [prompt for prompt, text in zip(LETTERS, whole, strict=True) if len(text) == 20][:2]
    logged, kept = [], []
    with serving(target, lambda prompt, ids: wrong(ids) if prompt in bad else ids) as server:
        keep, log = (lambda prompts, *_: kept.extend(prompts)), (lambda *counts: logged.append(counts))
        source = source_of(server.url, target, keep, log)
        texts = source.write(rows_of(LETTERS)).completions()
    assert texts == whole
    assert logged == [("rollout/dropped", len(bad), len(LETTERS))]
    assert sorted(kept) == sorted(prompt for prompt in LETTERS if prompt not in bad)


def test_text_whose_tokens_are_not_those_counted_is_dropped(target):
    """Such as text from which a server took the special tokens, or that was not written in its canonical tokens."""
    prompt, ids = LETTERS[0], own_texts(target, LETTERS[:1])[0]
    source = source_of("http://nowhere", target)

    def accepted(num_tokens):
        answer = Answer(TOKENIZER.decode(ids[:-1]), None, ids[-1] in STOPS, None, num_tokens)
        return source._accepted([prompt], {0: answer})

    assert ids[-1] in STOPS
    assert accepted(len(ids)) == accepted(None) == {0: ids}
    assert accepted(len(ids) + 1) == accepted(len(ids) - 1) == {}


MANY = [[5 + number % 27, 5 + number // 27, 8] for number in range(600)]


def test_a_server_of_another_model_is_refused(target):
    other = Target(tiny_model("qwen3", vocab_size=32, seed=5))
    kept = []
    with serving(other) as server:
        with pytest.raises(ServerError, match="not what the target writes.*serves this very target"):
            source_of(server.url, target, lambda prompts, *_: kept.extend(prompts)).write(rows_of(LETTERS))
    assert kept == []


@pytest.fixture(scope="module")
def drawing():
    """Entropy well between none and all."""
    return Target(tiny_model("qwen3", vocab_size=32, initializer_range=0.1))


def write_in_sets(source, prompts, size=50):
    for start in range(0, len(prompts), size):
        source.write(rows_of(prompts[start : start + size]))


def test_a_server_that_draws_otherwise_is_refused(drawing):
    """Each text alone might be the target's; all of them together are not."""
    kept = []
    with serving(drawing, sampling=SamplingParams(0.5)) as server:
        source = source_of(server.url, drawing, lambda p, *_: kept.extend(p), sampling=SamplingParams(1.0))
        with pytest.raises(
            ServerError, match="not what the target writes with .*temperature=1.0.*standard deviations"
        ):
            source.write(rows_of(MANY[:100]))
    assert source.faults.total() < 20 and kept == []


def test_the_right_server_is_never_in_doubt_for_long(drawing):
    kept, sampling = [], SamplingParams(1.0)
    with serving(drawing, sampling=sampling) as server:
        source = source_of(server.url, drawing, lambda p, *_: kept.extend(p), sampling=sampling)
        write_in_sets(source, MANY[:300], 100)
    assert sorted(kept) == sorted(MANY[:300]) and source.faults.total() <= 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0)], ids=["greedy", "T = 1"])
def test_a_server_that_turns_bad_is_noticed_whenever_it_does(drawing, sampling):
    """The first 200 texts are right, and make up for nothing."""
    kept, right = [], set(map(tuple, MANY[:200]))
    other = Target(tiny_model("qwen3", vocab_size=32, initializer_range=0.1, seed=7))

    def change(prompt, ids):
        settings = SpeculationSettings(20, STOPS, sampling)
        generator = torch.Generator().manual_seed(seed_of(prompt))
        return (
            ids if tuple(prompt) in right else speculate(other, None, [prompt], settings, generator).completions()[0]
        )

    with serving(drawing, change, sampling) as server:
        source = source_of(server.url, drawing, lambda p, *_: kept.extend(p), sampling=sampling)
        write_in_sets(source, MANY[:200])
        assert sorted(kept) == sorted(MANY[:200])
        with pytest.raises(ServerError, match="not what the target writes"):
            source.write(rows_of(MANY[200:300]))
    assert source.num_judged < 300
    assert not set(map(tuple, kept)) - right


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda ids: [*ids, *ids][:40], "longer than asked"),
        (lambda ids: [*ids[:-1], 32], "of ids outside the target's vocabulary"),
        (lambda ids: [-1, *ids[1:]], "of ids outside the target's vocabulary"),
        (lambda ids: [2**70, *ids[1:]], "of ids outside the target's vocabulary"),
        (lambda ids: ids[:1], "ending neither in a stop token nor at the limit"),
    ],
    ids=["too long", "vocabulary", "negative", "huge", "cut"],
)
def test_texts_of_no_use_are_told_before_the_target_reads_them(target, wrong, why):
    whole = own_texts(target, LETTERS)
    prompts = [prompt for prompt, text in zip(LETTERS, whole, strict=True) if len(text) == 20]
    prompts = [*prompts, *prompts, *prompts][:20]
    kept = []
    with serving(target, lambda prompt, ids: wrong(ids), too_long=True) as server:
        with pytest.raises(ServerError, match=why):
            source_of(server.url, target, lambda p, *_: kept.extend(p)).write(rows_of(prompts))
    assert kept == []
    # One of them among good ones is dropped, and nothing else happens.
    with serving(target, lambda prompt, ids: wrong(ids) if prompt == prompts[0] else ids, too_long=True) as server:
        texts = source_of(server.url, target).write(rows_of(LETTERS)).completions()
    assert texts == whole


def test_a_stop_token_outside_the_vocabulary_is_not_shown_to_the_target(target):
    source = source_of("http://nowhere", target)
    answer = Answer("ab", [5, 6], True, 10**6, 3)
    assert source._accepted([LETTERS[0]], {0: answer}) == {}
    assert source.faults == {"of ids outside the target's vocabulary": 1}


@pytest.mark.parametrize("dies_after", [3, 18], ids=["before it is judged", "after"])
def test_what_a_dying_server_sent_is_not_asked_for_again(target, tmp_path, dies_after):
    cache = TextCache(tmp_path, {})

    def write(url):
        source = source_of(url, target, cache.add)
        return CachedSource(source, cache, lambda *logged: None, 0, target.device).write(rows_of(LETTERS))

    with serving(target, dies_after=dies_after) as server:
        with pytest.raises(ServerError, match=f"{dies_after} of 20 texts had arrived; they are in the text cache"):
            write(server.url)
    assert len(cache) == dies_after
    with serving(target) as server:
        assert write(server.url).completions() == own_texts(target, LETTERS)
    assert len(server.requests) == 20 - dies_after
