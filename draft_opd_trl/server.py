"""A client of OpenAI-compatible completions endpoints: prompts → answers, several at once, as they arrive.

It speaks two dialects, and finds out which the server understands with its first request: prompts as token ids (vLLM,
SGLang, which then return token ids too), or prompts as text (`transformers serve`). Knows no models and does not judge
what it gets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from urllib3 import PoolManager, Retry, Timeout
from urllib3.exceptions import HTTPError

from .errors import UserError
from .sampling import SamplingParams


# Answers are handed on at least this often, in seconds.
INTERVAL = 2.0
# First pause before a repetition, in seconds; it doubles, and as much is added by chance.
BACKOFF = 0.5
# Worth a repetition: busy, restarting, or failed in a way that may pass.
PASSING_STATUSES = (408, 429, 500, 502, 503, 504)
# What a server says to a request it does not understand.
REFUSED = (400, 422)


class ServerError(UserError, RuntimeError):
    """A server that does not answer, or not as asked."""


@dataclass
class Answer:
    """
    What came back for a prompt.

    Args:
        text (`str`): The completion as text; engines leave the stop token out.
        token_ids (`list[int]`, *optional*): The completion as token ids, where the server returns them.
        stopped (`bool`): Ended by a stop token, not by its length.
        stop_token_id (`int`, *optional*): Which stop token, where the server says so.
        num_tokens (`int`, *optional*): Tokens the server counted, stop token included.
    """

    text: str
    token_ids: list[int] | None
    stopped: bool
    stop_token_id: int | None
    num_tokens: int | None


class CompletionsClient:
    """
    Asks a server to complete prompts.

    Args:
        url (`str`): Such as `http://localhost:8000`, with or without `/v1`.
        sampling ([`SamplingParams`]): The law to ask for.
        max_new_tokens (`int`): Longest completion, stop token included.
        stop_token_ids (`Sequence[int]`): Tokens that end a text.
        to_text (`Callable[[Sequence[int]], str | None]`): A text that the server's tokenizer turns into these ids, if
            there is one. Only for servers that take no ids.
        model (`str`, *optional*): Model to ask for; servers of one model need no name.
        token (`str`, *optional*): Sent as bearer token.
        timeout (`float`, *optional*, defaults to `600.0`): Seconds an answer may take.
        concurrency (`int`, *optional*, defaults to `64`): Requests under way at once.
        max_retries (`int`, *optional*, defaults to `5`): Repetitions of a failed request, with exponential back-off.
    """

    def __init__(
        self,
        url: str,
        sampling: SamplingParams,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        to_text: Callable[[Sequence[int]], str | None],
        model: str | None = None,
        token: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 64,
        max_retries: int = 5,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.stop_token_ids, self.to_text = list(stop_token_ids), to_text
        self.model, self.concurrency = model, concurrency
        self.takes_ids: bool | None = None
        retry = Retry(
            total=max_retries,
            backoff_factor=BACKOFF,
            backoff_jitter=BACKOFF,
            status_forcelist=PASSING_STATUSES,
            allowed_methods=None,
            raise_on_status=False,  # the last answer says more than "too many errors"
        )
        self._pool = PoolManager(
            maxsize=concurrency,
            block=True,
            timeout=Timeout(connect=min(10.0, timeout), read=timeout),
            retries=retry,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> Iterator[list[tuple[int, Answer | None]]]:
        """
        Complete all prompts.

        Args:
            prompts (`Sequence[Sequence[int]]`): Token ids.
            seeds (`Sequence[int]`): A seed for each, for servers that heed it.

        Yields:
            Index and answer of what arrived meanwhile, in any order; the answer is `None` where the prompt cannot be
            told to this server.

        Raises:
            `ServerError`: A request failed for good. All that arrived has been yielded before.
        """
        if self.takes_ids is None:
            self.takes_ids = self._find_dialect(prompts)
        pool = ThreadPoolExecutor(self.concurrency)
        futures = {
            pool.submit(self._complete, prompt, seed): index
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        }
        pending: set[Future] = set(futures)
        failure = None
        try:
            while pending:
                done, pending = wait(pending, INTERVAL, FIRST_EXCEPTION)
                failed = [future for future in done if future.exception() is not None]
                if failed and failure is None:
                    failure = failed[0].exception()
                    # Ask for nothing more; what is under way may still arrive.
                    pending = {future for future in pending if not future.cancel()}
                if len(done) > len(failed):
                    yield [(futures[future], future.result()) for future in done.difference(failed)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failure is not None:
            raise failure

    def _find_dialect(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether the server takes token ids."""
        by_ids = self._post(self._body_of_ids(prompts[0], 0) | {"max_tokens": 1})
        if by_ids.status not in REFUSED:
            self._check(by_ids)
            return True
        text = next((text for text in map(self.to_text, prompts) if text is not None), "")
        by_text = self._post(self._body_of_text(text, 0) | {"max_tokens": 1})
        if by_text.status in REFUSED:
            raise ServerError(
                f"{self.url} takes a prompt neither as token ids (status {by_ids.status}: {_excerpt(by_ids)}) nor as "
                f"text (status {by_text.status}: {_excerpt(by_text)}). Check `server_model`, and that the server's "
                "context is as long as prompt and completion together."
            )
        self._check(by_text)
        return False

    def _complete(self, prompt: Sequence[int], seed: int) -> Answer | None:
        if self.takes_ids:
            body = self._body_of_ids(prompt, seed)
        else:
            text = self.to_text(prompt)
            if text is None:
                return None
            body = self._body_of_text(text, seed)
        response = self._post(body)
        self._check(response)
        return _read_answer(response.json())

    def _body(self, seed: int) -> dict[str, Any]:
        body = {"max_tokens": self.max_new_tokens, "temperature": self.sampling.temperature}
        body |= {"top_p": self.sampling.top_p, "seed": seed}
        return body if self.model is None else body | {"model": self.model}

    def _body_of_ids(self, prompt: Sequence[int], seed: int) -> dict[str, Any]:
        """
        For vLLM and SGLang. What a model's generation config would bend (top-k, min-p, repetition) is spelt out, and
        text keeps its special tokens, as older versions return no ids.
        """
        return self._body(seed) | {
            "prompt": list(prompt),
            "top_k": self.sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.stop_token_ids,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
        }

    def _body_of_text(self, text: str, seed: int) -> dict[str, Any]:
        """For `transformers serve`, which refuses fields it does not know and draws only if its config says so."""
        config = {
            "do_sample": not self.sampling.greedy,
            "top_k": self.sampling.top_k,
            "eos_token_id": self.stop_token_ids,
            "pad_token_id": self.stop_token_ids[0],
        }
        return self._body(seed) | {"prompt": text, "generation_config": json.dumps(config)}

    def _post(self, body: dict[str, Any]):
        try:
            return self._pool.request("POST", self.url, json=body)
        except HTTPError as error:
            raise ServerError(
                f"{self.url} did not answer: {error}. Check that the server runs and `server_url` is right; raise "
                "`server_timeout` if it is only slow."
            ) from error

    def _check(self, response) -> None:
        if response.status != 200:
            raise ServerError(f"{self.url} answered with status {response.status}: {_excerpt(response)}")


def _excerpt(response) -> str:
    return response.data[:500].decode(errors="replace")


def _read_answer(body: dict[str, Any]) -> Answer:
    choice = body["choices"][0]
    matched = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's name, SGLang's name
    return Answer(
        text=choice["text"],
        token_ids=choice.get("token_ids"),
        stopped=choice["finish_reason"] == "stop",
        stop_token_id=matched if isinstance(matched, int) else None,
        num_tokens=(body.get("usage") or {}).get("completion_tokens"),
    )
