"""The client: both dialects, what it asks for, faults of every kind; and a real `transformers serve` process."""

import base64
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
import urllib3
from completions_server import CompletionsServer
from conftest import ROOT, tiny_tokenizer
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from draft_opd_trl import SamplingParams, SpeculationSettings, Target, stop_token_ids
from draft_opd_trl.core import endpoint
from draft_opd_trl.texts import server
from draft_opd_trl.texts.authorship import describe_misfit, text_fit
from draft_opd_trl.texts.prompts import tokenize_dataset
from draft_opd_trl.texts.server import CompletionsClient, ServerError
from draft_opd_trl.texts.server_source import ServerSource
from draft_opd_trl.texts.sources import DecodingSource
from draft_opd_trl.training.rollout import _faithful_text


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
        "return_spec_tokens_details": True,
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


# Servers that mean no good, or are not what they are taken for.


def refusal(fault, timeout=0.3, max_retries=0, **options):
    """What a server of this fault is refused with, and the server."""
    with CompletionsServer(echo, TOKENIZER, faults=[fault] * 100) as serving:
        with pytest.raises(ServerError) as raised:
            ask(
                make_client(serving.url, timeout=timeout, max_retries=max_retries, concurrency=2, **options),
                PROMPTS[:3],
            )
    assert "\n" not in str(raised.value)
    return str(raised.value), serving


def test_an_answer_has_no_more_bytes_than_its_tokens_need():
    message, serving = refusal("huge", timeout=5)
    limit = server.FRAME_BYTES + 8 * server.TOKEN_BYTES + 2 * server.PROMPT_TOKEN_BYTES
    assert f"sent more than the {limit} bytes that an answer can need" in message
    # What was sent beyond is in the buffers of the two sockets.
    assert serving.poured < 2 * (limit + 2**23)


def test_the_longest_honest_answer_is_read():
    """vLLM's: 8 of the longest tokens, in JSON's escapes, and the prompt's ids beside them."""
    choice = {"index": 0, "text": "é" * 128 * 8, "finish_reason": "length", "token_ids": [250_000] * 8}
    answer = json.dumps({"choices": [choice | {"prompt_token_ids": [250_000] * 5000}], "usage": None}).encode()
    with CompletionsServer(echo, TOKENIZER, faults=[answer]) as serving:
        answers = ask(make_client(serving.url), [[5] * 5000])
    assert answers[0].token_ids == [250_000] * 8


CHOICE = {"text": "a", "finish_reason": "stop"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>\x1b[31m\n</html>", "no completion: Expecting value.*began with: '<html>.\\[31m </html>'"),
        (b"", "no completion: Expecting value"),
        (b"\xff\xfe{", "no completion: "),
        (b"[" * 50_000, "no completion: .*recursion"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "no completion: .*integer string"),
        (b"[]", "the answer is \\[\\]"),
        (b"{}", "choices is None"),
        (b'{"choices": {}}', "choices is {}"),
        (b'{"choices": []}', "choices is empty"),
        (b'{"choices": [5]}', r"choices\[0\] is 5"),
        ({"finish_reason": "stop"}, r"choices\[0\].text is None"),
        ({"text": 5}, r"choices\[0\].text is 5"),
        (CHOICE | {"text": "\ud800"}, "surrogates not allowed"),
        (CHOICE | {"token_ids": "5"}, "token_ids is '5'"),
        (CHOICE | {"token_ids": [True]}, "a token of .*token_ids is True"),
        (CHOICE | {"token_ids": [1.0]}, "a token of .*token_ids is 1.0"),
        (CHOICE | {"finish_reason": 1}, "finish_reason is 1"),
        (b'{"choices": [{"text": "", "finish_reason": "stop"}], "usage": 5}', "usage is 5"),
    ],
)
def test_what_is_no_completion_is_said_to_be_none(answer, message):
    if isinstance(answer, dict):
        answer = json.dumps({"choices": [answer]}).encode()
    assert re.search(message, refusal(answer)[0])


def test_a_password_that_a_server_echoes_is_not_shown():
    with CompletionsServer(echo, TOKENIZER, faults=[b'{"choices": "it was hunter2"}']) as serving:
        client = make_client(serving.url.replace("//", "//me:hunter2@"), max_retries=0)
        with pytest.raises(ServerError, match="choices is 'it was ...'") as raised:
            ask(client, PROMPTS[:1])
    assert serving.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"me:hunter2").decode()
    assert client.url == f"{serving.url}/v1/completions" and "hunter2" not in str(raised.value)


def test_who_stops_asking_does_not_wait():
    """An interrupt, or a verdict on what came first, does not wait for hanging requests."""

    def slowly(prompt):
        time.sleep(0.0 if prompt == PROMPTS[0] else 3.0)
        return echo(prompt)

    with CompletionsServer(slowly, TOKENIZER) as serving:
        client = make_client(serving.url, concurrency=4, max_retries=50)
        stream, started = client.stream(PROMPTS, range(12)), time.monotonic()
        next(stream)
        stream.close()
        while client.endpoint._sockets:
            assert time.monotonic() - started < 2
            time.sleep(0.01)


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
    alone, logged = DecodingSource(Target(model), None, settings, 0), []
    source = ServerSource(client, tokenizer, alone, lambda *kept: None, lambda *counts: logged.append(counts))
    texts = source.write(rows)
    assert client.takes_ids is False and logged == [("rollout/dropped", 0, len(rows))]
    if temperature == 0:
        assert texts.completions() == alone.write(rows).completions()
    else:
        assert texts.completions() != alone.write(rows).completions()
        assert describe_misfit(text_fit(alone.target, texts, sampling), sampling) is None
