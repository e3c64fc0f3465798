"""Texts of a server, each read by the target once before it is trusted, and the server with them.

Knows how a server shows that it is not the target; not how it is asked (`server.py`), and no losses.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..core.endpoint import ServerError
from ..core.records import Rollout
from ..core.seeding import seed_of
from ..decoding.plain import until_stop
from .authorship import ShareWatch, TextFit, Watch, describe, likeliest_next, text_fit
from .engine_counts import Counters, EngineStats
from .server import Answer, CompletionsClient
from .sources import DecodingSource, Log, prompts_of


# As what the τ of a server's own speculation is logged.
SERVED = "rollout/served_acceptance_length"
# What is wrong with a text of a server, as messages say it.
STRANGE = "not what the target writes"
# Shares of texts that are wrong: what happens at worst with a right server (kernels of other noise than we know; odd
# tokenisations), and what is to be noticed.
STRANGERS, UNUSABLE = (0.05, 0.3), (0.2, 0.6)
# Texts that the message about a server describes.
NUM_DESCRIBED = 64


class ServerSource:
    """
    A server writes, and the target reads every text once before it is trusted.

    A text is dropped, and written by the target in this process, if its shape is wrong or if the target would not have
    written it ([`TextFit`]). What each text says of the server adds up in running tests ([`Watch`]): over the ratios
    of the texts that were not dropped, which a slight fault shifts, and over the shares of those that were.

    Args:
        client ([`CompletionsClient`]): Asks the server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        fallback ([`DecodingSource`]): The target alone, for texts that were dropped.
        keep (`Callable`): Called as `keep(prompts, completions, draw)` with texts on which the verdict is given. While
            a test is in doubt, texts wait.
        log (`Callable`): Takes a metric's name, and how many of how many.
        progress (`bool`): Show a progress bar.
        stats (`Callable`, *optional*): Makes an [`EngineStats`] of this server, which is asked for what its
            speculation came to where the answers do not tell.
    """

    def __init__(
        self,
        client: CompletionsClient,
        tokenizer: PreTrainedTokenizerBase,
        fallback: DecodingSource,
        keep: Callable[[list[list[int]], list[list[int]], int], None],
        log: Log,
        progress: bool = False,
        stats: Callable[[], EngineStats] | None = None,
    ) -> None:
        self.make_stats, self.stats = stats, None
        self.client, self.tokenizer, self.fallback = client, tokenizer, fallback
        self.target, self.settings = fallback.target, fallback.settings
        self.keep, self.log, self.progress = keep, log, progress
        self.num_judged = 0
        self.faults: Counter[str] = Counter()
        self.law: Watch | None = None
        self.strangers, self.unusable = ShareWatch(*STRANGERS), ShareWatch(*UNUSABLE)
        self.latest: deque[TextFit] = deque(maxlen=NUM_DESCRIBED)

    def write(self, rows: list[dict], draw: int = 0) -> Rollout:
        """
        See [`RolloutSource`].

        Raises:
            `ServerError`: The server failed for good, or its texts are not the target's.
        """
        prompts = prompts_of(rows)
        seeds = [seed_of(self.fallback.seed, draw, prompt) for prompt in prompts]
        texts: dict[int, list[int]] = {}
        held: list[int] = []  # arrived, but a running test is in doubt
        answers: list[Answer] = []
        before = self._counters()

        def keep_held() -> None:
            self.keep([prompts[index] for index in held], [texts[index] for index in held], draw)
            held.clear()

        with tqdm(total=len(rows), desc="Server", disable=not self.progress, leave=False) as bar:
            try:
                for group in self.client.stream(prompts, seeds):
                    answers += [answer for _, answer in group if answer is not None]
                    accepted = self._accepted(prompts, dict(group))
                    texts |= accepted
                    held += accepted
                    if all(watch.calm for watch in self._watches()):
                        keep_held()
                    bar.update(len(group))
                    tokens = sum(map(len, texts.values()))
                    bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
            except _WrongServerError:
                raise
            except ServerError as error:
                keep_held()
                raise ServerError(
                    f"{error} {len(texts)} of {len(rows)} texts had arrived; they are in the text cache and are not "
                    "asked for again."
                ) from error
        keep_held()
        self._log_served(before, answers)
        dropped = [index for index in range(len(rows)) if index not in texts]
        self.log("rollout/dropped", len(dropped), len(rows))
        if dropped:
            written = self.fallback.write([rows[index] for index in dropped], draw).completions()
            texts |= dict(zip(dropped, written, strict=True))
        completions = [texts[index] for index in range(len(rows))]
        return Rollout.from_ids(prompts, completions, self.settings.pad_token_id, self.target.device)

    def _counters(self) -> Counters:
        """The server's, all `None` where it shows none: that it does not must end no run."""
        try:
            if self.stats is None and self.make_stats is not None:
                self.stats = self.make_stats()
            return Counters() if self.stats is None else self.stats.counters()
        except ServerError:
            return Counters()

    def _log_served(self, before: Counters, answers: list[Answer]) -> None:
        """τ of the server's own speculation, from what its answers tell, else from its counters, if it speculates."""
        if answers and all(answer.num_tokens and answer.verifications is not None for answer in answers):
            tokens, requests = sum(answer.num_tokens for answer in answers), len(answers)
            verifications = sum(answer.verifications for answer in answers)
        elif answers and before.verifications is not None:
            counted = self.stats.since(before, len(answers))
            tokens, requests, verifications = counted.tokens, counted.requests, counted.verifications
        else:
            return
        if tokens is not None and requests is not None and verifications:
            # A text's first token comes from the prefill.
            self.log(SERVED, tokens - requests, verifications)

    def _accepted(self, prompts: list[list[int]], answers: dict[int, Answer | None]) -> dict[int, list[int]]:
        """Completions that may be trained on. Every answer counts for or against the server, and may be the last."""
        completions = {i: self._tokens(answer) for i, answer in answers.items() if answer is not None}
        faults = {i: "a prompt that no text tells" for i, answer in answers.items() if answer is None}

        def find_faults(of: Callable[[Answer, list[int]], str | None]) -> None:
            found = {i: of(answers[i], ids) for i, ids in completions.items() if i not in faults}
            faults.update({i: fault for i, fault in found.items() if fault is not None})

        # Before the target reads anything: an id outside its vocabulary ends the process on a GPU.
        find_faults(self._unreadable)
        self._add_stops(prompts, answers, {i: ids for i, ids in completions.items() if i not in faults})
        find_faults(self._fault)
        whole = [i for i in completions if i not in faults]
        ratios = {}
        if whole:
            fit = text_fit(
                self.target,
                self._rollout([prompts[i] for i in whole], [completions[i] for i in whole]),
                self.settings.sampling,
            )
            self.latest.extend(fit[index : index + 1] for index in range(len(fit)))
            ratios = dict(zip(whole, fit.ratios.tolist(), strict=True))
            faults |= {i: STRANGE for i, own in zip(whole, fit.is_targets().tolist(), strict=True) if not own}
        for i in answers:
            self._count(faults.get(i), ratios.get(i))
            self._check_server()
        return {i: completions[i] for i in whole if i not in faults}

    def _tokens(self, answer: Answer) -> list[int]:
        if answer.token_ids is not None:
            return list(answer.token_ids)
        return self.tokenizer(answer.text, add_special_tokens=False)["input_ids"]

    def _unreadable(self, answer: Answer, completion: list[int]) -> str | None:
        """Why the target cannot read a completion."""
        if len(completion) > self.settings.max_new_tokens:
            return "longer than asked"
        ids = completion if answer.stop_token_id is None else [*completion, answer.stop_token_id]
        if not all(0 <= token < self.target.vocab_size for token in ids):
            return "of ids outside the target's vocabulary"
        return None

    def _add_stops(
        self, prompts: list[list[int]], answers: dict[int, Answer], completions: dict[int, list[int]]
    ) -> None:
        """Engines leave the stop token out of the text, and some out of the token ids."""
        stops = self.settings.stop_token_ids
        open_ends = [i for i, ids in completions.items() if answers[i].stopped and not (ids and ids[-1] in stops)]
        if open_ends:
            texts = self._rollout([prompts[i] for i in open_ends], [completions[i] for i in open_ends])
            for i, guess in zip(open_ends, likeliest_next(self.target, texts, list(stops)), strict=True):
                told = answers[i].stop_token_id
                completions[i].append(guess if told is None else told)

    def _fault(self, answer: Answer, completion: list[int]) -> str | None:
        """What is wrong with the shape of a completion, its stop token included."""
        stops = self.settings.stop_token_ids
        if answer.token_ids is None and answer.num_tokens not in (None, len(completion)):
            return "of other tokens than the server counted"
        if len(completion) > self.settings.max_new_tokens:
            return "longer than asked"
        if until_stop(completion, stops) != completion:
            return "going on after a stop token"
        if len(completion) < self.settings.max_new_tokens and completion[-1:] not in [[stop] for stop in stops]:
            return "ending neither in a stop token nor at the limit"
        return None

    def _rollout(self, prompts: list[list[int]], completions: list[list[int]]) -> Rollout:
        return Rollout.from_ids(prompts, completions, self.settings.pad_token_id, self.target.device)

    def _watches(self) -> list[Watch]:
        return [self.strangers, self.unusable, *([] if self.law is None else [self.law])]

    def _count(self, fault: str | None, ratios: list[float] | None) -> None:
        """What one text says of the server. A dropped text counts as such and no more, as one may be an accident."""
        self.num_judged += 1
        self.unusable.count(fault is not None and ratios is None)
        if ratios is not None:
            self.strangers.count(fault is not None)
        if fault is not None:
            self.faults[fault] += 1
        elif ratios is not None:
            self.law = self.law or Watch(len(ratios))
            self.law.add(ratios)

    def _check_server(self) -> None:
        if not any(watch.alarmed for watch in self._watches()):
            return
        sampling, dropped = self.settings.sampling, self.faults.total()
        said = f" The target reads {describe(TextFit.cat(list(self.latest)), sampling)}." if self.latest else ""
        why = ", ".join(f"{count} {fault}" for fault, count in self.faults.most_common())
        raise _WrongServerError(
            f"The texts of {self.client.url} are not what the target writes with {sampling}.{said} Of "
            f"{self.num_judged} texts so far, {dropped} had to be dropped{f' ({why})' if why else ''}. Check that it "
            "serves this very target (model, revision, quantisation) and heeds the sampling settings, and prefer a "
            "server that takes and returns token ids (vLLM, SGLang). Texts from before the doubt are in the text "
            "cache; delete it if you want none of this server's texts."
        )


class _WrongServerError(ServerError):
    """Texts that are not the target's: they are not to be kept."""
