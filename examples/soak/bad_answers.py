"""Answers of a completions server that are wrong, broken or hostile: in the end the target's own texts, or an error.

The server stands in the process of the case. Where nothing is said against it, it answers as the target writes.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from verdicts import Input
from world import world

from draft_opd_trl import DraftOPDConfig, SpeculationSettings, speculate
from draft_opd_trl.training.rollout import build_source


LENGTH = 12
ROWS = 20
JUNK: tuple[Any, ...] = (None, "", "x", [], {}, [[]], -1, 10**6, 10**30, 0.5, float("nan"), True, {"x": 1})
# What may be wrong with the whole answer, as bytes and headers.
RAW = (
    "empty", "cut", "null", "list", "number", "html", "deep", "latin-1", "bomb", "long", "drip", "redirect", "away",
    "404", "500", "503, later", "204", "lies of its length",
)  # fmt: skip
FIELDS = ("choices", "usage", "text", "token_ids", "finish_reason", "stop_reason", "index", "completion_tokens")
CHANGES = (
    "a token",
    "negative",
    "too large",
    "fraction",
    "flag",
    "word",
    "too long",
    "too short",
    "another's",
    "empty",
)


def _change_ids(ids: list[int], way: str, draws: Random, others: list[list[int]]) -> list[Any]:
    place = draws.randrange(len(ids)) if ids else 0
    single = {"negative": -1, "too large": 10**6, "fraction": 0.5, "flag": True, "word": "7"}
    if way in single:
        return [*ids[:place], single[way], *ids[place + 1 :]]
    if way == "a token":
        return [*ids[:place], (ids[place] + draws.randrange(1, 1000)) % 1024, *ids[place + 1 :]]
    return {"longer": ids * 10, "shorter": ids[: len(ids) // 2], "empty": []}.get(way, draws.choice(others))


def _changed(body: dict, way: tuple[str, Any], draws: Random, others: list[list[int]]) -> dict:
    choice = body["choices"][0]
    if way[0] == "ids":
        choice["token_ids"] = _change_ids(choice["token_ids"], way[1], draws, others)
        choice["text"] = world().tokenizer.decode([token for token in choice["token_ids"] if type(token) is int])
        return body
    name, value = way[1]
    place = next((part for part in (body, choice, body["usage"]) if name in part), choice)
    if value == "missing":
        place.pop(name, None)
    else:
        place[name] = value
    return body


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: dict[tuple, list[int]]
    way: tuple[str, Any]
    share: float
    draws: Random
    lock = threading.Lock()

    def do_GET(self):
        self.do_POST()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        prompt = tuple(asked.get("prompt") or ()) if isinstance(asked.get("prompt"), list) else ()
        ids = list(self.answers.get(prompt, [7]))[: asked.get("max_tokens", LENGTH)]
        stopped = ids[-1] in world().stops
        choice = {"index": 0, "text": world().tokenizer.decode(ids[:-1] if stopped else ids), "token_ids": ids}
        choice |= {"finish_reason": "stop" if stopped else "length", "stop_reason": None}
        body = {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}
        with self.lock:
            hit = asked.get("max_tokens", LENGTH) > 1 and self.draws.random() < self.share
        if hit and self.way[0] != "raw":
            body = _changed(body, self.way, self.draws, list(self.answers.values()))
        data = json.dumps(body).encode()
        if not hit or self.way[0] != "raw":
            return self._send(200, data)
        self._misbehave(self.way[1], data)

    def _send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def _misbehave(self, way: str, data: bytes) -> None:
        bodies = {"empty": b"", "cut": data[: len(data) // 2], "null": b"null", "list": b"[]", "number": b"7"}
        bodies |= {
            "html": b"<html>" * 50,
            "deep": b"[" * 200_000,
            "latin-1": b'{"choices": "\xe4"}',
            "long": b" " * 10**8,
        }
        if way in bodies:
            return self._send(200, bodies[way])
        if way == "bomb":
            return self._send(200, gzip.compress(b" " * 10**8), Content_Encoding="gzip")
        if way == "drip":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.5)
            return None
        if way in ("redirect", "away"):
            place = "/v1/completions" if way == "redirect" else "http://127.0.0.1:9/v1/completions"
            return self._send(307, b"", Location=place)
        if way == "503, later":
            return self._send(503, b"busy", Retry_After="100000")
        if way == "lies of its length":
            self.close_connection = True
            return self._send(200, data, len(data) + 50)
        return self._send(int(way), b"no")

    def log_message(self, *arguments):
        pass


def _ask(scratch: str, texts: dict[tuple, list[int]], way: tuple[str, Any], share: float, seed: int) -> str | None:
    answering = {"answers": texts, "way": way, "share": share, "draws": Random(seed)}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), answering))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    config = DraftOPDConfig(
        f"{scratch}/{seed}",
        rollout_source="server",
        server_url=url,
        server_timeout=2.0,
        server_max_retries=1,
        server_concurrency=8,
        max_completion_length=LENGTH,
        report_to="none",
    )
    settings = SpeculationSettings(LENGTH, world().stops, batch_size=ROWS)
    source = build_source(config, world().target, None, world().tokenizer, settings, lambda name, part, whole: None)
    rows = [{"prompt_ids": list(prompt)} for prompt in texts]
    written = source.write(rows).completions()
    wrong = sum(ours != theirs for ours, theirs in zip(written, texts.values(), strict=True))
    return None if not wrong else f"{wrong} of {ROWS} texts are not the target's: {way[0]}, {way[1]}"


def answers(scratch: str, draws: Random) -> Iterator[Input]:
    """A server each, of which one answer or all are bad."""
    settings = SpeculationSettings(LENGTH, world().stops, batch_size=ROWS)
    prompts = world().prompts[:ROWS]
    written = speculate(world().target, None, prompts, settings).completions()
    texts = {tuple(prompt): text for prompt, text in zip(prompts, written, strict=True)}
    while True:
        kind = draws.choice(("raw", "ids", "field"))
        if kind == "field":
            what: Any = (draws.choice(FIELDS), draws.choice(("missing", *JUNK)))
        else:
            what = draws.choice(RAW if kind == "raw" else CHANGES)
        share, seed = draws.choice((0.05, 0.3, 1.0)), draws.randrange(2**32)
        shown = f"server whose {kind} is {what!r} in {share:.0%} of answers, seed {seed}"

        def act(way=(kind, what), share=share, seed=seed) -> str | None:
            return _ask(scratch, texts, way, share, seed)

        yield Input("answers", shown, act, ["http://127.0.0.1", "server"])
