"""What an engine says of its own speculation: per answer, in its counters, and of how it was started.

The names are those of vLLM 0.32 and 0.33 and of SGLang 0.5.23. Knows no models, and takes nothing that an engine says
for more than its word.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

from ..core.endpoint import Endpoint, ServerError


# Bytes that a page of counters or of settings can have.
PAGE_BYTES = 8 * 2**20
# Counters are read until they have caught up with the answers: this long, and this often, in seconds.
CATCH_UP, PAUSE = 5.0, 0.05
# Ours → each engine's counters, without the `_total` that Prometheus puts behind them.
COUNTERS = {
    "vLLM": {
        "requests": "vllm:request_success",
        "tokens": "vllm:generation_tokens",
        "cached": "vllm:prefix_cache_hits",
        "verifications": "vllm:spec_decode_num_drafts",
        "slots": "vllm:spec_decode_num_accepted_tokens_per_pos",
    },
    "SGLang": {
        "requests": "sglang:num_requests",
        "tokens": "sglang:generation_tokens",
        "cached": "sglang:cached_tokens",
        "verifications": "sglang:spec_verify_calls",
    },
}
# Where in an answer, and under which names: verifications, proposals, and by accepted proposals the blocks.
PER_ANSWER = (
    ("metrics", "speculative_decoding", "num_spec_steps", "num_draft_tokens", "acceptance_histogram"),
    (
        *("sglext", "spec_tokens_details"),
        *("spec_verify_ct", "spec_num_proposed_drafts", "spec_correct_drafts_histogram"),
    ),
)
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*?)(?:_total)?(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Verified:
    """
    What verification said of a text, or of several together, as the engine counted it.

    Args:
        verifications (`int`): Blocks that were verified.
        by_slot (`list[int]`): By slot k, blocks whose first k proposals were all accepted; a text's last block counts
            whole, also where the text ends inside it. Empty where the engine does not say.
        num_draft_tokens (`int`, *optional*): K, where the engine says.
    """

    verifications: int
    by_slot: list[int] = field(default_factory=list)
    num_draft_tokens: int | None = None


def verified_in(body: dict[str, Any]) -> Verified | None:
    """
    What a completions answer says of its own verifications; `None` where it says nothing, or not as we know it.

    vLLM tells with `--per-request-spec-decode-metrics`, SGLang where `return_spec_tokens_details` asks for it, but
    nothing of a text without a verification. The means beside the counts are not read: SGLang's `spec_accept_length`
    counts the prefill's token among those committed.
    """
    parts = ((body.get(place), part, names) for place, part, *names in PER_ANSWER)
    told = [(whole.get(part), names) for whole, part, names in parts if isinstance(whole, dict)]
    told, names = next(((found, names) for found, names in told if isinstance(found, dict)), ({}, ()))
    if not told:
        return None
    steps, proposed, histogram = (told.get(name) for name in names)
    counts = [steps, proposed, *(histogram if isinstance(histogram, list) else [None])]
    if not all(type(count) is int and count >= 0 for count in counts):
        return None
    slots = told.get("num_spec_tokens") or (round(proposed / steps) if steps else None)
    by_slot = [sum(histogram[slot:]) for slot in range(1, len(histogram))]
    return Verified(steps, by_slot + [0] * ((slots or 0) - len(by_slot)), slots)


def read_samples(page: str) -> list[tuple[str, dict[str, str], float]]:
    """Samples of a page in Prometheus' text format: name without `_total`, labels, value."""
    found = []
    for line in page.splitlines():
        if sample := _SAMPLE.match(line):
            name, labels, value = sample.groups()
            try:
                found.append((name, dict(_LABEL.findall(labels or "")), float(value)))
            except ValueError:
                continue
    return found


@dataclass
class Counters:
    """
    An engine's counters since its start, or, as a difference, over a while. Several engines behind one address are
    added up.

    Args:
        requests, tokens, cached (`int`, *optional*): Requests that ended, tokens written, prompt tokens found in the
            prefix cache; each where it is counted.
        verifications (`int`, *optional*): Blocks verified; `None` where the engine does not speculate.
        by_slot (`list[int]`): As in [`Verified`].
    """

    requests: int | None = None
    tokens: int | None = None
    cached: int | None = None
    verifications: int | None = None
    by_slot: list[int] = field(default_factory=list)

    @classmethod
    def read(cls, page: str) -> Counters:
        """Those of a `/metrics` page, of whichever engine."""
        samples = read_samples(page)
        seen = {name for name, _, _ in samples}
        names = next((names for names in COUNTERS.values() if seen & set(names.values())), {})
        slots: dict[int, float] = {}
        sums: dict[str, float] = {}
        for name, labels, value in samples:
            if name == names.get("slots") and labels.get("position", "").isdecimal():
                slot = int(labels["position"])
                slots[slot] = slots.get(slot, 0) + value
            sums[name] = sums.get(name, 0) + value
        told = {ours: int(sums[theirs]) for ours, theirs in names.items() if theirs in sums and ours != "slots"}
        return cls(**told, by_slot=[int(slots.get(slot, 0)) for slot in range(max(slots, default=-1) + 1)])

    def __sub__(self, before: Counters) -> Counters:
        def less(now: int | None, then: int | None) -> int | None:
            return None if now is None else now - (then or 0)

        names = ("requests", "tokens", "cached", "verifications")
        then = before.by_slot or [0] * len(self.by_slot)
        by_slot = [now - earlier for now, earlier in zip(self.by_slot, then, strict=True)]
        return Counters(*(less(getattr(self, name), getattr(before, name)) for name in names), by_slot)


class EngineStats:
    """
    What the engine behind an address says of itself.

    Args:
        url, token, timeout, max_retries: As for [`Endpoint`].

    Attributes:
        engine, version (`str`, *optional*): `"vLLM"` or `"SGLang"`, where it says so.
        settings (`dict`): SGLang's, as it was started; empty for others.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 600.0, max_retries: int = 5) -> None:
        self._of = lambda path: Endpoint(url, path, token, timeout, max_retries)
        self.engine: str | None = None
        self.settings = self._page("/server_info", "speculative_algorithm")
        self.version = self.settings.get("version")
        if self.settings:
            self.engine = "SGLang"
        elif version := self._page("/version", "version"):
            self.engine, self.version = "vLLM", str(version["version"])

    def _page(self, path: str, field: str) -> dict[str, Any]:
        """A page of JSON that has a field; empty where there is no such page."""
        response = self._of(path).get(PAGE_BYTES)
        try:
            page = json.loads(response.data) if response.status == 200 else {}
        except (ValueError, RecursionError):
            return {}
        return page if isinstance(page, dict) and field in page else {}

    def counters(self) -> Counters:
        """As they stand; all `None` where the engine shows none."""
        response = self._of("/metrics").get(PAGE_BYTES)
        return Counters.read(response.data.decode(errors="replace")) if response.status == 200 else Counters()

    def since(self, before: Counters, requests: int) -> Counters:
        """What was counted since `before`, once as many requests have ended, or not any more to be waited for."""
        ends, last = time.monotonic() + CATCH_UP, None
        while True:
            counted = self.counters() - before
            done = counted.requests is None or counted.requests >= requests
            if (done and counted == last) or time.monotonic() > ends:
                return counted
            last = counted
            time.sleep(PAUSE)

    def template(self, prompt: Any, chat_template_kwargs: dict[str, Any], tools: Any = None) -> list[int] | None:
        """
        A prompt's ids as the server makes them of text or messages; `None` where it does not tell.

        Raises:
            `ServerError`: It refuses the prompt, such as a conversation that its template does not take.
        """
        body: dict[str, Any] = {"prompt": prompt}
        if not isinstance(prompt, str):
            body = {"messages": prompt, "chat_template_kwargs": chat_template_kwargs}
            body |= {"tools": tools} if tools else {}
        endpoint = self._of("/tokenize")
        response = endpoint.post(body, PAGE_BYTES)
        if response.status in (404, 405):
            return None
        endpoint.check(response)
        try:
            tokens = json.loads(response.data)["tokens"]
        except (ValueError, TypeError, KeyError, RecursionError):
            tokens = None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ServerError(
                f"{endpoint.url} sent no list of tokens, but {endpoint.excerpt(response)!r}. Check that `server_url` "
                "is a vLLM or an SGLang."
            )
        return tokens
