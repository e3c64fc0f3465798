"""A client of OpenAI-compatible completions endpoints: prompts → answers, several at once, as they arrive.

It speaks two dialects, and finds out which the server understands with its first request: prompts as token ids (vLLM,
SGLang, which then return token ids too), or prompts as text (`transformers serve`). Knows no models and does not judge
what it gets, beyond its shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from ..core.endpoint import Endpoint, Response, ServerError, printable
from ..core.sampling_params import SamplingParams
from .engine_counts import Verified, verified_in


# Answers are handed on at least this often, in seconds.
INTERVAL = 2.0
# Bytes an answer may have: for its frame, for a token of the completion (the longest are 128 characters, and its id
# comes beside it), and for a token of the prompt, whose ids vLLM sends back. JSON may take 6 bytes for a character.
FRAME_BYTES, TOKEN_BYTES, PROMPT_TOKEN_BYTES = 65536, 1024, 16
# What a server says to a request it does not understand.
REFUSED = (400, 422)


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
        verified ([`Verified`], *optional*): What verification said of this text, where the server tells.
    """

    text: str
    token_ids: list[int] | None
    stopped: bool
    stop_token_id: int | None
    num_tokens: int | None
    verified: Verified | None = None

    @property
    def verifications(self) -> int | None:
        """Blocks verified; a text of one token comes from the prefill, whatever is told of it."""
        if self.num_tokens == 1:
            return 0
        return None if self.verified is None else self.verified.verifications


class CompletionsClient:
    """
    Asks a server to complete prompts.

    Args:
        url (`str`): Such as `http://localhost:8000`, with or without `/v1`. A name and password in it
            (`https://name:password@host`) are sent as basic authentication, and left out of every message.
        sampling ([`SamplingParams`]): The law to ask for.
        max_new_tokens (`int`): Longest completion, stop token included.
        stop_token_ids (`Sequence[int]`): Tokens that end a text.
        to_text (`Callable[[Sequence[int]], str | None]`): A text that the server's tokenizer turns into these ids, if
            there is one. Only for servers that take no ids.
        model (`str`, *optional*): Model to ask for; servers of one model need no name.
        token (`str`, *optional*): Sent as bearer token.
        timeout (`float`, *optional*, defaults to `600.0`): Seconds an answer may take, from the first byte sent to the
            last received.
        concurrency (`int`, *optional*, defaults to `64`): Requests under way at once.
        max_retries (`int`, *optional*, defaults to `5`): Repetitions of a failed request, with exponential back-off.
            A pause is never longer than a minute or `timeout`.

    Raises:
        `ValueError`: No such address, or credentials that no request can carry.
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
        self.endpoint = Endpoint(url, "/v1/completions", token, timeout, max_retries)
        self.url = self.endpoint.url
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.stop_token_ids, self.to_text = list(stop_token_ids), to_text
        self.model, self.concurrency = model, concurrency
        self.takes_ids: bool | None = None

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
        self.endpoint.start()
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
            if pending:  # left early, by an interrupt or a verdict: nobody waits for what is under way
                self.endpoint.stop()
        if failure is not None:
            raise failure

    def _find_dialect(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether the server takes token ids."""
        by_ids = self._post(self._body_of_ids(prompts[0], 0) | {"max_tokens": 1}, len(prompts[0]))
        if by_ids.status not in REFUSED:
            self.endpoint.check(by_ids)
            return True
        text = next((text for text in map(self.to_text, prompts) if text is not None), "")
        by_text = self._post(self._body_of_text(text, 0) | {"max_tokens": 1}, len(prompts[0]))
        if by_text.status in REFUSED:
            ids_said, text_said = self.endpoint.excerpt(by_ids), self.endpoint.excerpt(by_text)
            raise ServerError(
                f"{self.url} takes a prompt neither as token ids (status {by_ids.status}: {ids_said}) nor as text "
                f"(status {by_text.status}: {text_said}). Check `server_model`, and that the server's context is as "
                "long as prompt and completion together."
            )
        self.endpoint.check(by_text)
        return False

    def _complete(self, prompt: Sequence[int], seed: int) -> Answer | None:
        if self.takes_ids:
            body = self._body_of_ids(prompt, seed)
        else:
            text = self.to_text(prompt)
            if text is None:
                return None
            body = self._body_of_text(text, seed)
        response = self._post(body, len(prompt))
        self.endpoint.check(response)
        try:
            return read_answer(response.data)
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{self.url} sent an answer that is no completion: "
                f"{self.endpoint.show(str(error) or type(error).__name__)}. It began with: "
                f"{self.endpoint.excerpt(response)!r}. Check that this is an OpenAI-compatible completions server."
            ) from error

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
            "return_spec_tokens_details": True,  # SGLang's; vLLM is told at its start
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

    def _post(self, body: dict[str, Any], prompt_length: int) -> Response:
        return self.endpoint.post(
            body, FRAME_BYTES + TOKEN_BYTES * self.max_new_tokens + PROMPT_TOKEN_BYTES * prompt_length
        )


def read_answer(data: bytes) -> Answer:
    """
    The completion in a server's answer.

    Args:
        data (`bytes`): As it came.

    Raises:
        `ValueError`: It is no JSON, lacks a field or has one of another type; the message says which.
    """
    body = json.loads(data)

    def need(value: Any, name: str, *types: type) -> Any:
        # By exact type: true is an int to Python, and is no token.
        if type(value) not in types:
            raise ValueError(f"{name} is {printable(repr(value), 60)}")
        return value

    choices = need(need(body, "the answer", dict).get("choices"), "choices", list)
    if not choices:
        raise ValueError("choices is empty")
    choice = need(choices[0], "choices[0]", dict)
    text = need(choice.get("text"), "choices[0].text", str)
    token_ids = need(choice.get("token_ids"), "choices[0].token_ids", list, type(None))
    for token in token_ids or []:
        need(token, "a token of choices[0].token_ids", int)
    if token_ids is None and not text.isascii():
        text.encode()  # half a surrogate pair is no text
    usage = need(body.get("usage"), "usage", dict, type(None)) or {}
    matched = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's name, SGLang's name
    return Answer(
        text=text,
        token_ids=token_ids,
        stopped=need(choice.get("finish_reason"), "choices[0].finish_reason", str, type(None)) == "stop",
        stop_token_id=matched if type(matched) is int else None,
        num_tokens=need(usage.get("completion_tokens"), "usage.completion_tokens", int, type(None)),
        verified=verified_in(body),
    )
