"""An HTTP address that takes JSON and answers within bounds, whatever stands behind it.

A server is somebody else's program, so nothing it does is without a limit: the seconds of an answer are counted from
the first byte sent to the last received, its bytes by what the caller says it can need, the pauses it asks for are
cut, and what is sent goes to the address given and to no other. Knows nothing of completions.
"""

from __future__ import annotations

import base64
import json
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, IncompleteRead
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import InputError, UserError
from .redaction import redact_url


# First pause before a repetition, in seconds; it doubles, and as much is added by chance.
BACKOFF = 0.5
# Longest pause, whatever a server's Retry-After says, and longest wait for a connection, in seconds.
MAX_PAUSE, MAX_CONNECT = 60.0, 10.0
# Bytes read of an answer that says what is wrong.
MAX_ERROR_BYTES = 65536
# Worth a repetition: busy, restarting, or failed in a way that may pass.
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)


class ServerError(UserError, RuntimeError):
    """A server that does not answer, or not as asked."""


@dataclass(frozen=True)
class Response:
    """What came back; `data` is cut for any status but 200."""

    status: int
    data: bytes
    retry_after: float
    location: str | None


class Endpoint:
    """
    Where requests go.

    Args:
        url (`str`): `http` or `https`. A name and password in it are sent as basic authentication; `self.url` is
            without them.
        path (`str`): What is asked for there.
        token (`str`, *optional*): Sent as bearer token.
        timeout (`float`): Seconds an answer may take, all of it.
        max_retries (`int`): Repetitions of a failed request, with exponential back-off.

    Raises:
        `ValueError`: No such address, or credentials that no request can carry.
    """

    def __init__(self, url: str, path: str, token: str | None, timeout: float, max_retries: int) -> None:
        self.timeout, self.max_retries = timeout, max_retries
        self._parse(url, path)
        if token and self._credentials:
            raise InputError(
                f"There is both a password in the URL of {self.url} and a `server_token`, and a request carries one "
                "of them. Drop one."
            )
        if token and not (token.isascii() and token.isprintable()):
            raise InputError("`server_token` holds characters that no HTTP header can carry. Check how it was read.")
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._secrets = [token] if token else []
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        if self._credentials:
            self._secrets = [self._credentials.partition(":")[2]]
            self._headers["Authorization"] = "Basic " + base64.b64encode(self._credentials.encode()).decode()
        self._tls = ssl.create_default_context() if self._secure else None
        self._stopped = threading.Event()
        self._sockets: set[socket.socket] = set()

    def _parse(self, url: str, path: str) -> None:
        wrong = f"`server_url` is {printable(redact_url(url))!r}; it must be such as http://localhost:8000"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"{wrong}, and its host or port cannot be read.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{wrong}, with http:// or https:// and a host.")
        if parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
            raise InputError(f"{wrong}, without `?` or `#` and in plain characters.")
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1") + path
        self._credentials = None
        if parts.username is not None:
            self._credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._path}"

    def post(self, body: Any, limit: int) -> Response:
        """
        Send JSON, again where a failure may pass.

        Args:
            body (`Any`): To be sent as JSON.
            limit (`int`): Most bytes a good answer can need.

        Raises:
            `ServerError`: No answer, one of more bytes, or one that is compressed.
        """
        return self._ask("POST", json.dumps(body).encode(), limit)

    def get(self, limit: int) -> Response:
        """As [`post`], and nothing is sent."""
        return self._ask("GET", None, limit)

    def _ask(self, method: str, data: bytes | None, limit: int) -> Response:
        for attempt in range(self.max_retries + 1):
            pause = BACKOFF * 2**attempt * (1 + random.random())
            try:
                response = self._exchange(method, data, limit)
            except (OSError, HTTPException, UnicodeError) as error:  # the last: no name of a host
                if attempt == self.max_retries:
                    raise ServerError(
                        f"{self.url} did not answer: {str(error) or type(error).__name__}. Check that the server runs "
                        "and `server_url` is right; raise `server_timeout` if it is only slow."
                    ) from error
            else:
                if response.status not in PASSING_STATUSES or attempt == self.max_retries:
                    return response
                pause = max(pause, response.retry_after)
            if self._stopped.wait(min(pause, MAX_PAUSE, self.timeout)):
                break
        raise ServerError(f"{self.url} was not asked again, as nobody waits for its answer.")

    def check(self, response: Response) -> None:
        """
        Raises:
            `ServerError`: Any status but 200.
        """
        if 300 <= response.status < 400:
            place = self.show(redact_url(response.location or "nowhere"))
            raise ServerError(
                f"{self.url} answered with status {response.status} and sends prompts on to {place}. Redirects are "
                "not followed, as the prompts would go to a place you did not name. If it is right, make it "
                "`server_url`."
            )
        if response.status != 200:
            raise ServerError(f"{self.url} answered with status {response.status}: {self.excerpt(response)}")

    def excerpt(self, response: Response) -> str:
        """How an answer begins."""
        return self.show(response.data[:2000].decode(errors="replace"))

    def show(self, text: str) -> str:
        """What a server says, on one line, without the secrets that servers like to echo."""
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        return printable(text)

    def start(self) -> None:
        """Take requests again after [`stop`]."""
        self._stopped.clear()

    def stop(self) -> None:
        """End what is under way, as nobody waits for it."""
        self._stopped.set()
        for sock in list(self._sockets):
            _hang_up(sock)

    def _exchange(self, method: str, data: bytes | None, limit: int) -> Response:
        """One request and its answer, within `timeout` seconds and `limit` bytes."""
        with self._connection() as connection:
            connection.request(method, self._path, data, self._headers)
            answer = connection.getresponse()
            encoding = answer.getheader("Content-Encoding", "identity")
            if encoding != "identity":
                raise ServerError(
                    f"{self.url} sent an answer packed as {printable(encoding)}, which was not asked for and could "
                    "unpack to any size. Turn compression off in the server, or in the proxy before it."
                )
            limit = limit if answer.status == 200 else MAX_ERROR_BYTES
            received = answer.read(limit + 1)
            if answer.status == 200 and len(received) > limit:
                raise ServerError(
                    f"{self.url} sent more than the {limit} bytes that an answer can need, and the rest was not read. "
                    "Check that `server_url` is an OpenAI-compatible completions server."
                )
            if answer.length and len(received) <= limit:
                raise IncompleteRead(received, answer.length)
        pause, location = answer.getheader("Retry-After", ""), answer.getheader("Location")
        # A date is not heeded.
        return Response(answer.status, received[:limit], float(pause) if pause.isdecimal() else 0.0, location)

    @contextmanager
    def _connection(self) -> Iterator[HTTPConnection]:
        """
        A connection that is hung up on when the time is over. A socket's own limit is one for each read, which a
        server that sends a byte now and then never reaches.
        """
        late = threading.Event()
        sock = socket.create_connection((self._host, self._port), min(MAX_CONNECT, self.timeout))
        sock.settimeout(self.timeout)
        if self._tls is not None:
            sock = self._tls.wrap_socket(sock, server_hostname=self._host, do_handshake_on_connect=False)
        timer = threading.Timer(self.timeout, lambda: (late.set(), _hang_up(sock)))
        timer.daemon = True
        timer.start()
        self._sockets.add(sock)
        try:
            with sock:
                if self._tls is not None:
                    sock.do_handshake()
                connection = HTTPConnection(self._host, self._port)
                connection.sock = sock
                yield connection
        except (OSError, HTTPException):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            self._sockets.discard(sock)
        if late.is_set():  # an answer without a length then ends as if it were whole
            raise TimeoutError(f"timed out, no whole answer within {self.timeout:g} s")


def _hang_up(sock: socket.socket) -> None:
    """End what any thread reads from or writes to a socket; also under TLS, whose own `shutdown` is for one thread."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def printable(text: str, length: int = 300) -> str:
    """A stranger's text on one line, without control characters."""
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    return text if len(text) <= length else text[:length] + "…"
