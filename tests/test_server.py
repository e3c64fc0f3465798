"""The client: both dialects, what it asks for, faults of every kind; and a real `transformers serve` process."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import urllib3
from completions_server import CompletionsServer
from conftest import tiny_tokenizer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, endpoint, server, stop_token_ids
from draft_opd_trl.consistency import describe_misfit, text_fit
from draft_opd_trl.prompts import tokenize_dataset
from draft_opd_trl.rollout import DecodingSource, ServerSource, _faithful_text
from draft_opd_trl.server import CompletionsClient, ServerError


ROOT = Path(__file__).parents[1]
POCKET = ROOT / "examples" / "pocket"
TOKENIZER = tiny_tokenizer()
STOP = 0
GREEDY = SamplingParams()
PROMPTS = [[5 + number, 6] for number in range(12)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server, "INTERVAL", 0.05)
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


def echo(prompt):
    """The prompt's first token twice, then the end."""
    return [prompt[0], prompt[0], STOP], True


def make_client(url, sampling=GREEDY, **options):
    return CompletionsClient(url, sampling, 8, [STOP, 3], TOKENIZER.decode, **options)


def ask(client, prompts=PROMPTS):
    return dict(itertools.chain.from_iterable(client.stream(prompts, range(len(prompts)))))


def test_token_ids_in_and_out():
    with CompletionsServer(echo, TOKENIZER) as serving:
        answers = ask(make_client(serving.url, SamplingParams(0.7, 0, 0.9)))
    assert sorted(answers) == list(range(12))
    for index, prompt in enumerate(PROMPTS):
        assert answers[index].token_ids == [prompt[0], prompt[0], STOP]
        assert answers[index].stopped and answers[index].num_tokens == 3
    assert sorted(body["prompt"] for body in serving.requests) == PROMPTS
    body = next(body for body in serving.requests if body["prompt"] == PROMPTS[4])
    # Nothing is left to the server's own defaults, which may come from the model's generation config.
    assert body == {
        "prompt": PROMPTS[4],
        "max_tokens": 8,
        "temperature": 0.7,
        "top_k": -1,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 4,
        "stop_token_ids": [STOP, 3],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    }


def test_a_server_of_text_is_told_text():
    with CompletionsServer(echo, TOKENIZER, takes_ids=False) as serving:
        client = make_client(serving.url + "/v1/", SamplingParams(0.7, 4))
        answers = ask(client)
    assert client.takes_ids is False
    assert answers[2].text == TOKENIZER.decode([7, 7]) and answers[2].token_ids is None
    body = next(body for body in serving.requests if body["seed"] == 2)
    assert body["prompt"] == TOKENIZER.decode(PROMPTS[2])
    assert json.loads(body["generation_config"])["do_sample"] and json.loads(body["generation_config"])["top_k"] == 4
    assert json.loads(body["generation_config"])["eos_token_id"] == [STOP, 3]


def test_a_prompt_that_no_text_tells_is_left_out():
    with CompletionsServer(echo, TOKENIZER, takes_ids=False) as serving:
        client = make_client(serving.url)
        client.to_text = lambda ids: None if ids == PROMPTS[0] else TOKENIZER.decode(ids)
        answers = ask(client)
    assert answers[0] is None and sum(answer is None for answer in answers.values()) == 1


def test_model_and_token_are_sent():
    with CompletionsServer(echo, TOKENIZER) as serving:
        ask(make_client(serving.url, model="served", token="secret"))
    assert {body["model"] for body in serving.requests} == {"served"}
    assert {headers["Authorization"] for headers in serving.headers} == {"Bearer secret"}


def test_never_more_at_once_than_allowed():
    def slowly(prompt):
        time.sleep(0.02)
        return echo(prompt)

    with CompletionsServer(slowly, TOKENIZER) as serving:
        ask(make_client(serving.url, concurrency=3))
    assert serving.most_at_once == 3


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "cut", "slow"])
def test_faults_that_pass_cost_nothing_but_time(fault):
    with CompletionsServer(echo, TOKENIZER, faults=[fault] * 3) as serving:
        answers = ask(make_client(serving.url, timeout=0.5, max_retries=3))
    assert len(answers) == 12 and serving.faults == []
    assert all(answers[index].token_ids[0] == prompt[0] for index, prompt in enumerate(PROMPTS))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, 'status 500: {"error": "injected"}'),
        (404, 'status 404: {"error": "injected"}'),
        ("reset", "did not answer.*Check that the server runs"),
        ("slow", "did not answer.*timed out.*raise `server_timeout`"),
    ],
)
def test_faults_that_stay_are_named(fault, message):
    with CompletionsServer(echo, TOKENIZER, faults=[fault] * 100) as serving:
        with pytest.raises(ServerError, match=message):
            ask(make_client(serving.url, timeout=0.2, max_retries=1, concurrency=2), PROMPTS[:3])


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=f"{url}/v1/completions did not answer.*`server_url` is right"):
        ask(make_client(url, max_retries=1))


def test_a_server_that_takes_neither():
    with CompletionsServer(echo, TOKENIZER, takes_ids=False, takes_text=False) as serving:
        with pytest.raises(ServerError, match="neither as token ids .status 422.*nor as text .status 422.*Check"):
            ask(make_client(serving.url))


def test_what_arrived_before_a_death_is_handed_on():
    with CompletionsServer(echo, TOKENIZER, dies_after=5) as serving:
        arrived = {}
        with pytest.raises(ServerError, match="did not answer"):
            for group in make_client(serving.url, max_retries=1, concurrency=2).stream(PROMPTS, range(12)):
                arrived |= dict(group)
    assert len(arrived) == serving.answered == 5
    assert all(answer.token_ids == [PROMPTS[index][0]] * 2 + [STOP] for index, answer in arrived.items())


@pytest.fixture(scope="module")
def transformers_serve():
    """The pocket target behind `transformers serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += [str(POCKET / "target"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32"], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                if urllib3.request("GET", f"{url}/health", retries=False, timeout=5).status == 200:
                    break
            except urllib3.exceptions.HTTPError:
                time.sleep(0.2)
            assert process.poll() is None and time.monotonic() < deadline, "transformers serve did not start"
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_serve_writes_what_the_target_writes(transformers_serve, temperature):
    tokenizer = AutoTokenizer.from_pretrained(POCKET / "target")
    model = AutoModelForCausalLM.from_pretrained(POCKET / "target", dtype=torch.float32)
    file = str(POCKET / "prompts" / "heldout.jsonl")
    rows = list(tokenize_dataset(load_dataset("json", data_files=file, split="train[:10]"), tokenizer, None))
    sampling = SamplingParams(temperature, top_k=20 if temperature else 0)
    settings = SpeculationSettings(64, stop_token_ids(model, tokenizer), sampling)
    client = CompletionsClient(
        transformers_serve,
        sampling,
        settings.max_new_tokens,
        settings.stop_token_ids,
        lambda ids: _faithful_text(tokenizer, ids),
        concurrency=4,
    )
    alone, logged = DecodingSource(Target(model), None, settings, 0), {}
    texts = ServerSource(client, tokenizer, alone, lambda *kept: None, logged.__setitem__).write(rows)
    assert client.takes_ids is False and logged == {"rollout/dropped": 0.0}
    if temperature == 0:
        assert texts.completions() == alone.write(rows).completions()
    else:
        assert texts.completions() != alone.write(rows).completions()
        assert describe_misfit(text_fit(alone.target, texts, sampling), sampling) is None
