"""An address that answers within bounds, whatever stands behind it: time, bytes, pauses, redirects, credentials."""

import base64
import json
import time

import pytest
from completions_server import CompletionsServer
from conftest import tiny_tokenizer
from engine_server import EngineServer

from draft_opd_trl.core import endpoint
from draft_opd_trl.core.endpoint import Endpoint, ServerError, printable
from draft_opd_trl.core.errors import InputError


BODY = {"prompt": [5, 6], "max_tokens": 8}
LIMIT = 10_000


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "BACKOFF", 0.01)


def serving(*faults):
    return CompletionsServer(lambda prompt: (prompt, False), tiny_tokenizer(), faults=faults)


def asked(url, token=None, timeout=0.3, max_retries=0):
    return Endpoint(url, "/v1/completions", token, timeout, max_retries)


def test_json_goes_out_and_an_answer_comes_back():
    with serving() as server:
        response = asked(server.url, token="x").post(BODY, LIMIT)
    assert response.status == 200 and json.loads(response.data)["choices"][0]["token_ids"] == [5, 6]
    assert server.requests == [BODY] and server.headers[0]["Authorization"] == "Bearer x"


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504, "reset", "cut"])
def test_what_may_pass_is_asked_again_as_often_as_allowed(fault):
    with serving(fault, fault) as server:
        assert asked(server.url, max_retries=2).post(BODY, LIMIT).status == 200
    with serving(fault, fault) as server:
        if isinstance(fault, int):
            assert asked(server.url, max_retries=1).post(BODY, LIMIT).status == fault
        else:
            with pytest.raises(ServerError, match="did not answer.*Check that the server runs"):
                asked(server.url, max_retries=1).post(BODY, LIMIT)
    assert server.faults == []


def test_a_page_is_got_without_sending_anything():
    with EngineServer(None, None, None) as server:
        pages = {path: Endpoint(server.url + "/v1", path, None, 5.0, 0).get(1000) for path in ("/version", "/gone")}
    assert json.loads(pages["/version"].data) == {"version": "0.32.0"}
    assert pages["/gone"].status == 404


def test_what_cannot_pass_is_not_asked_again():
    with serving(404, 404) as server:
        address = asked(server.url, max_retries=5)
        response = address.post(BODY, LIMIT)
    assert response.status == 404 and server.faults == [404]
    with pytest.raises(ServerError, match='answered with status 404: {"error": "injected"}'):
        address.check(response)


def test_the_time_limit_is_one_for_the_whole_answer():
    """Each byte comes well within it, and they never end."""
    started = time.monotonic()
    with serving("drip") as server, pytest.raises(ServerError, match="timed out, no whole answer within 0.3 s"):
        asked(server.url).post(BODY, LIMIT)
    assert time.monotonic() - started < 2


def test_an_answer_of_too_many_bytes_is_not_read_on():
    with serving("huge") as server, pytest.raises(ServerError, match="sent more than the 10000 bytes that an answer"):
        asked(server.url, timeout=5).post(BODY, LIMIT)
    # What was sent beyond is in the buffers of the two sockets.
    assert server.poured < 2 * 2**23
    with serving(b"x" * LIMIT) as server:
        assert len(asked(server.url).post(BODY, LIMIT).data) == LIMIT


def test_compressed_answers_are_refused():
    with serving("packed") as server, pytest.raises(ServerError, match="packed as gzip, which was not asked for"):
        asked(server.url).post(BODY, LIMIT)


def test_a_pause_is_asked_for_in_vain_beyond_the_time_limit():
    started = time.monotonic()
    with serving({"Retry-After": "3600"}) as server:
        assert asked(server.url, max_retries=1).post(BODY, LIMIT).status == 200
    assert 0.3 < time.monotonic() - started < 3


def test_nothing_is_sent_on_to_another_place():
    with serving() as elsewhere:
        with serving({"Location": elsewhere.url.replace("//", "//name:secret@")}) as server:
            address = asked(server.url)
            response = address.post(BODY, LIMIT)
        with pytest.raises(ServerError) as raised:
            address.check(response)
    place = elsewhere.url.replace("//", "//***@")  # it came with a password
    assert f"status 307 and sends prompts on to {place}. Redirects are not followed" in str(raised.value)
    assert elsewhere.headers == []


def test_who_no_longer_waits_is_not_answered():
    with serving(500, 500) as server:
        address = asked(server.url, max_retries=5)
        address.stop()
        with pytest.raises(ServerError, match="was not asked again, as nobody waits"):
            address.post(BODY, LIMIT)
        address.start()
        assert address.post(BODY, LIMIT).status == 200
    assert server.faults == []


# -- addresses and credentials -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999", "http://[::1", "http://a b",
     "http://host/?key=1", "http://host/#x", "http://hö.st", "http://host\n/", "me:hunter2@host", ""],
)  # fmt: skip
def test_what_is_no_address(url):
    with pytest.raises(InputError, match="`server_url` is .*it must be such as http://localhost:8000") as raised:
        asked(url.replace("//", "//me:hunter2@") if "//" in url else url)
    assert "hunter2" not in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://host/a", "http://host/a/", "http://host/a/v1", "http://host/a/v1/"])
def test_an_address_with_or_without_its_end_is_the_same(url):
    assert asked(url).url == "http://host/a/v1/completions"


def test_a_host_that_is_no_name():
    with pytest.raises(ServerError, match="did not answer"):
        asked("http://" + "a" * 70 + ".invalid").post(BODY, LIMIT)


@pytest.mark.parametrize("token", ["new\nline", "ö"])
def test_a_token_that_no_header_carries(token):
    with pytest.raises(InputError, match="`server_token` holds characters") as raised:
        asked("http://host", token)
    assert token not in str(raised.value)


def test_a_password_is_sent_and_never_shown():
    with serving() as server:
        address = asked(server.url.replace("//", "//me:hunter%202@"))
        address.post(BODY, LIMIT)
    assert server.headers[0]["Authorization"] == "Basic " + base64.b64encode(b"me:hunter 2").decode()
    assert address.url == f"{server.url}/v1/completions"
    assert address.show("it was hunter 2\n") == "it was ***"
    with pytest.raises(InputError, match="both a password in the URL of http://host/v1/completions and"):
        asked("http://me:hunter2@host", token="x")


def test_a_strangers_text_is_shown_on_one_short_line():
    assert printable("a\n\tb\x1b[31m") == "a b�[31m"
    assert printable("x" * 301) == "x" * 300 + "…"
