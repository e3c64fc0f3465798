"""A completions server for tests: in vLLM's shapes, or knowing text only, and failing on demand."""

import gzip
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LocalServer:
    """A server at a free port of this machine, while its `with` lasts."""

    def __init__(self, handler):
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class CompletionsServer(LocalServer):
    """
    Answers `POST /v1/completions` with `answer(prompt ids) -> (completion ids, stopped)`.

    Args:
        answer (`Callable`): The model.
        tokenizer: For text.
        takes_ids, returns_ids, takes_text (`bool`): Whether it understands token ids, gives them, understands text.
        faults (`list`): What goes wrong with the first requests after the probe, one each: a status, "reset", "cut"
            (dies in the middle of an answer), "slow", "drip" (a byte now and then, for ever), "huge" (no end),
            "packed" (compressed), `bytes` (the answer as it is), or a dict of headers, sent with status 429 or, where
            there is a `Location`, 307.
        dies_after (`int`, *optional*): Answers given before every further connection is reset.
        too_long (`bool`): Heeds no `max_tokens`.
    """

    def __init__(
        self,
        answer,
        tokenizer,
        takes_ids=True,
        returns_ids=True,
        takes_text=True,
        faults=(),
        dies_after=None,
        too_long=False,
    ):
        self.answer, self.tokenizer = answer, tokenizer
        self.takes_ids, self.returns_ids, self.takes_text = takes_ids, returns_ids, takes_text
        self.faults, self.dies_after, self.too_long = list(faults), dies_after, too_long
        self.requests, self.headers = [], []
        self.poured = 0
        self.answered = self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    server.headers.append(dict(self.headers))
                try:
                    server.respond(self, body)
                except ConnectionError:  # the client hung up
                    self.close_connection = True
                finally:
                    with server.lock:
                        server.at_once -= 1

            def log_message(self, *arguments):
                pass

        super().__init__(Handler)

    def respond(self, handler, body):
        ids = not isinstance(body["prompt"], str)
        if not (self.takes_ids if ids else self.takes_text):
            return self.send(handler, 422, {"detail": "not such a prompt"})
        with self.lock:
            probe = body["max_tokens"] == 1
            fault = self.faults.pop(0) if self.faults and not probe else None
            dead = self.dies_after is not None and self.answered >= self.dies_after
            if not (probe or fault or dead):
                self.answered += 1
                self.requests.append(body)
        if fault == "reset" or dead:
            handler.close_connection = True
            return handler.connection.shutdown(socket.SHUT_RDWR)
        if fault == "slow":
            time.sleep(1.0)
        elif isinstance(fault, int):
            return self.send(handler, fault, {"error": "injected"})
        elif isinstance(fault, dict):
            return self.send(handler, 307 if "Location" in fault else 429, {"error": "injected"}, headers=fault)
        elif isinstance(fault, bytes):
            return self.send(handler, 200, fault)
        elif fault == "packed":
            return self.send(handler, 200, gzip.compress(bytes(10**6)), headers={"Content-Encoding": "gzip"})
        elif fault in ("drip", "huge"):
            return self.pour(handler, bytes(1) if fault == "drip" else bytes(65536), 0.05 if fault == "drip" else 0.0)
        prompt = body["prompt"] if ids else self.tokenizer(body["prompt"])["input_ids"]
        completion, stopped = self.answer(prompt)
        if not self.too_long:
            completion = completion[: body["max_tokens"]]
        shown = completion[:-1] if stopped else completion
        text = self.tokenizer.decode([token for token in shown if 0 <= token < len(self.tokenizer)])
        choice = {"index": 0, "text": text, "finish_reason": "stop" if stopped else "length"}
        if ids and self.returns_ids:
            choice |= {"token_ids": completion, "stop_reason": None}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(completion)}
        self.send(handler, 200, {"choices": [choice], "usage": usage}, cut=fault == "cut")

    def send(self, handler, status, body, cut=False, headers=()):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def pour(self, handler, data, pause):
        """Send until the client hangs up, or for ten seconds."""
        handler.close_connection = True
        handler.send_response(200)
        handler.end_headers()
        ends = time.monotonic() + 10
        while time.monotonic() < ends:
            handler.wfile.write(data)
            self.poured += len(data)
            time.sleep(pause)
