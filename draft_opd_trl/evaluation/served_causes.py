"""Why an engine's acceptance is not what is measured here: each cause with a check, a sentence and a remedy.

The texts that the engine wrote are replayed here. What the replay says of them differs from our own measurement by
what is *written* (prompts, target); what the engine says of them differs from the replay by what is *drafted* (K,
taps, mask token, weights, how proposals are drawn, cached prefixes). The checks go through both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..core.errors import UserError
from ..core.records import Rollout
from ..core.target import Target
from ..decoding.acceptance import LEVEL, RESAMPLES, AcceptanceReport, interval_of, resampled
from ..decoding.speculation import SpeculationSettings
from ..drafters.base import Drafter
from ..folders.checkpoints import load_drafter
from ..texts.authorship import describe, text_fit
from .by_replay import replay_along
from .served import ServedReport
from .served_prompts import Check


# A difference of τ below this share is called none: kernels of another dtype swap near-ties.
NEGLIGIBLE = 0.02
# A change of the drafter is the engine's only where their verifications differ, part by part, by at most this share:
# another drafter may have the same τ, and not the same counts.
SAME_COUNTS = 0.03
# Mask tokens that are tried, and texts that each try is replayed on.
NUM_MASKS, NUM_TEXTS = 16, 32
# Share of the target's greedy tokens from which on a text looks like this model, computed otherwise.
SAME_MODEL = 0.9


@dataclass
class Try:
    """A drafter that the engine may have: what it is told otherwise, and its verifications by part."""

    cause: str
    words: str
    verifications: torch.Tensor


class Explanation:
    """
    An engine's report held against a drafter and a target.

    Args:
        served ([`ServedReport`]): Of the engine.
        prompts (`Sequence[Sequence[int]]`): Ids that it was sent.
        target ([`Target`]), drafter ([`Drafter`]): Bound to each other.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's; names tokens that may be taken for masks.
        settings ([`SpeculationSettings`]): Distribution, and whether proposals are drawn.
        seeds (`Sequence[int]`): One a prompt.
        started (`dict`): What the engine says of how it was started.
        folder (`str`, *optional*): Drafter's folder that the engine was started with.
        ask_again (`Callable`, *optional*): Sends the first prompts, as many as it is told, once more.
    """

    def __init__(
        self,
        served: ServedReport,
        prompts: Sequence[Sequence[int]],
        target: Target,
        drafter: Drafter,
        tokenizer: PreTrainedTokenizerBase,
        settings: SpeculationSettings,
        seeds: Sequence[int],
        started: dict[str, Any],
        folder: str | None = None,
        ask_again: Callable[[int], ServedReport] | None = None,
    ) -> None:
        self.served, self.prompts, self.seeds = served, [list(prompt) for prompt in prompts], list(seeds)
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.settings, self.started, self.folder, self.ask_again = settings, started, folder, ask_again

    # -- replays ------------------------------------------------------------------------------------------------

    def _replayed(self, count: int | None = None, layers: Sequence[int] | None = None, **changes: Any) -> list[int]:
        """By text, verifications that the drafter would have needed for the engine's first `count` texts."""
        settings = dataclasses.replace(self.settings, **changes)
        texts, size, found = self.served.completions[:count], settings.batch_size, []
        for first in range(0, len(texts), size):
            part = slice(first, min(first + size, len(texts)))
            rollout = Rollout.from_ids(self.prompts[part], texts[part], settings.pad_token_id, self.target.device)
            runs = replay_along(self.target, self.drafter, rollout, settings, self.seeds[part], layers)
            found += [len(accepted) for _, accepted in runs]
        return found

    @cached_property
    def replay(self) -> torch.Tensor:
        """Verifications by part, of the drafter as it is."""
        return self.served.by_part(self._replayed())

    def _change(self, theirs: torch.Tensor, ours: torch.Tensor, committed: torch.Tensor | None = None) -> list[float]:
        """τ of the first less τ of the second, verifications by part, with its interval; of the same texts."""
        written = self.served.committed[: len(theirs)]
        numerators = torch.stack([written, written if committed is None else committed], dim=1)
        denominators = torch.stack([theirs, ours], dim=1)
        first, second = (numerators.sum(0) / denominators.sum(0).clamp(min=1)).tolist()
        ratios = resampled(numerators, denominators, RESAMPLES, seed=0)
        return [first - second, *interval_of(ratios[:, 0] - ratios[:, 1], LEVEL)]

    def _fits(self, theirs: torch.Tensor, ours: torch.Tensor) -> bool:
        mean, low, high = self._change(theirs, ours)
        scale = float(self.served.committed[: len(theirs)].sum() / theirs.sum().clamp(min=1))
        return low <= 0 <= high or abs(mean) <= NEGLIGIBLE * scale

    def _tau(self, verifications: torch.Tensor) -> float:
        return float(self.served.committed[: len(verifications)].sum() / verifications.sum().clamp(min=1))

    # -- what is written ----------------------------------------------------------------------------------------

    def check_target(self) -> Check:
        """Whether the engine's texts are the target's own."""
        texts = Rollout.from_ids(self.prompts, self.served.completions, self.settings.pad_token_id, self.target.device)
        fit = text_fit(self.target, texts, self.settings.sampling)
        told = describe(fit, self.settings.sampling)
        own = fit.is_targets()
        if bool(fit.pooled().is_targets()) and float(own.float().mean()) >= SAME_MODEL:
            return Check("target", False, f"the texts are this target's: {told}")
        likely = "another model, revision or template"
        if float(fit.pooled().agreement) >= SAME_MODEL:
            likely = "this model quantised, in another dtype, or fine-tuned"
        known = [name for name in ("quantization", "dtype", "model_path") if self.started.get(name)]
        named = ", ".join(f"{name} {self.started[name]}" for name in known)
        return Check(
            "target",
            True,
            f"{int((~own).sum())} of {len(own)} texts are not what --teacher writes. It reads {told}. That is "
            f"{likely}{f' (the engine says: {named})' if named else ''}",
            "Train and evaluate with the target as it is served (--load_in_4bit, --dtype), or serve the one that the "
            "drafter was trained with.",
        )

    # -- what is drafted ----------------------------------------------------------------------------------------

    def check_length(self) -> Check:
        """Whether the engine proposes as many tokens as the drafter was trained to."""
        served, ours = self.served.num_draft_tokens, self.drafter.num_draft_tokens
        if not served:
            return Check("K", None, "the engine does not say how many tokens it proposes")
        topk = self.started.get("speculative_eagle_topk")
        if type(topk) is int and topk > 1:
            return Check(
                "K",
                True,
                f"the engine proposes trees (--speculative-eagle-topk {topk}), and here a chain is measured",
                "Start it with --speculative-eagle-topk 1 to compare.",
            )
        if served == ours:
            return Check("K", False, f"the engine proposes {served} tokens a verification, as the drafter was trained")
        return Check(
            "K",
            True,
            f"the engine proposes {served} tokens a verification, and the drafter was trained to propose {ours}",
            "Start it with the command that `draft-opd inspect DRAFTER --target TARGET` prints.",
        )

    def check_draws(self) -> Check:
        """Above temperature 0: whether proposals are drawn, or the drafter's argmax, as they are here."""
        if self.settings.sampling.greedy:
            return Check("draft sampling", False, "at temperature 0 all proposals are the drafter's argmax")
        drawn = self.settings.sample_proposals
        words = {True: "drawn", False: "the drafter's argmax"}
        if self._fits(self.served.verifications, self.replay):
            return Check("draft sampling", False, f"τ is that of proposals that are {words[drawn]}, as here")
        other = self.served.by_part(self._replayed(sample_proposals=not drawn))
        if not self._fits(self.served.verifications, other):
            return Check("draft sampling", False, "τ is neither that of drawn proposals nor that of argmax ones")
        return Check(
            "draft sampling",
            True,
            f"τ is that of proposals that are {words[not drawn]} ({self._tau(other):.2f}), and here they are "
            f"{words[drawn]} ({self._tau(self.replay):.2f})",
            f"Measure with{'out' if drawn else ''} --sample_proposals, or serve with draft_sample_method "
            f"{'probabilistic' if drawn else 'greedy'}.",
        )

    def check_cache(self) -> Check:
        """Whether prompts whose prefix is in the engine's cache are drafted for as they were before."""
        if self.ask_again is None or not self.settings.sampling.greedy:
            return Check("prefix caching", None, "not tried: it needs temperature 0 and a server that still answers")
        again = self.ask_again(NUM_TEXTS)
        count = len(again.completions)
        texts = [text for part in again.parts for text in part.texts]
        whole = [part for part in self.served.parts if set(part.texts) <= set(texts)]
        same = [text for text in range(count) if again.completions[text] == self.served.completions[text]]
        if len(whole) < len(again.parts) or len(same) < count:
            return Check("prefix caching", None, "not judged: asked again, the engine wrote other texts")
        before, now = self.served.verifications[: len(again.parts)], again.verifications
        first, second = self._tau(before), self._tau(now)
        if self._fits(now, before):
            return Check("prefix caching", False, f"{count} prompts sent again: τ {second:.2f} after {first:.2f}")
        return Check(
            "prefix caching",
            True,
            f"{count} prompts sent again, as the cache then holds them: τ {second:.2f} after {first:.2f}",
            "Start the engine with --no-enable-prefix-caching (vLLM) or --disable-radix-cache (SGLang), or take "
            "another version of it.",
        )

    def check_folder(self) -> list[Check]:
        """The drafter's folder that the engine was started with, against ours."""
        try:
            theirs = load_drafter(self.folder, dtype=self.target.dtype)
        except UserError as error:
            return [Check("drafter", True, f"{self.folder} cannot be read: {error}", "`draft-opd inspect` it.")]
        ours, found = self.drafter, []

        def differs(cause: str, what: str, their: Any, our: Any) -> None:
            if their != our:
                told = f"{self.folder} has the {what} {their}, and --model {our}"
                found.append(Check(cause, True, told, "Put the trained value back into its config.json."))

        if theirs.kind == ours.kind:
            differs("taps", "target_layer_ids", list(theirs.target_layer_ids), list(ours.target_layer_ids))
            differs("mask token", "mask_token_id", *(getattr(one, "mask_token_id", None) for one in (theirs, ours)))
        own, read = ours.state_dict(), theirs.state_dict()
        changed = [
            name
            for name in sorted({*own, *read})
            if name not in own or name not in read or not _equal(own[name], read[name])
        ]
        if changed:
            told = f"{self.folder} is another {theirs.kind} drafter: {len(changed)} of its {len(read)} tensors differ"
            found.append(Check("drafter", True, told, "Start the engine with the folder of --model."))
        return found or [Check("drafter", False, f"{self.folder} has --model's taps, mask token and weights")]

    def _tries(self, count: int) -> Iterator[Try]:
        """The drafter as it would draft with other taps, and with other mask tokens, on the engine's first texts."""
        parts = ServedReport(self._whole_parts(count), self.served.by_answer)
        size = max(text for part in parts.parts for text in part.texts) + 1
        taps = list(self.drafter.target_layer_ids)
        for layers in _moved(taps, self.target.num_layers - 1):
            words = f"its taps at layers {layers} instead of {taps}"
            yield Try("taps", words, parts.by_part(self._replayed(size, layers=layers)))
        mask = getattr(self.drafter, "mask_token_id", None)
        for token in _masks(self.tokenizer, mask, self.target.vocab_size):
            with _mask_of(self.drafter, token):
                verifications = parts.by_part(self._replayed(size))
            yield Try("mask token", f"mask token {token} instead of {mask}", verifications)

    def _whole_parts(self, count: int) -> list[Any]:
        """The first parts, one at least, of at most so many texts."""
        ends = [sum(len(part.texts) for part in self.served.parts[: i + 1]) for i in range(len(self.served.parts))]
        return self.served.parts[: max(sum(end <= count for end in ends), 1)]

    def check_drafter(self) -> Check:
        """By elimination: what of the drafter is told the engine otherwise."""
        count = len(self._whole_parts(NUM_TEXTS))
        theirs, as_is = self.served.verifications[:count], self.replay[:count]
        tries = list(self._tries(NUM_TEXTS))
        told = f"on the engine's texts --model has τ {self._tau(as_is):.2f}, and the engine {self._tau(theirs):.2f}"
        nearest = min(tries, key=lambda one: float((one.verifications - theirs).abs().sum()), default=None)
        if nearest is not None and self._fits(theirs, nearest.verifications):
            gap, rest = (float((one - theirs).abs().sum()) for one in (as_is, nearest.verifications))
            if rest <= min(gap / 2, SAME_COUNTS * float(theirs.sum())):
                return Check(
                    nearest.cause,
                    True,
                    f"{told}; with {nearest.words} it has {self._tau(nearest.verifications):.2f}",
                    "Compare config.json of the folder that the engine was started with to that of --model "
                    "(--served_model FOLDER does), and put the trained values back.",
                )
        tried = ", ".join(
            f"{sum(one.cause == cause for one in tries)} other {cause}s".replace("tapss", "taps")
            for cause in dict.fromkeys(one.cause for one in tries)
        )
        return Check(
            "drafter",
            True,
            f"{told}; {f'none of {tried} has the same counts' if tried else 'taps and mask tokens it has none'}. "
            "So the engine has other weights, or computes them otherwise",
            "Start it with the folder of --model; `draft-opd inspect` the one it has, or name it with --served_model.",
        )

    def _drafting(self, target: Check, length: Check) -> list[Check]:
        """What is left when the texts are the target's and K is right."""
        served = self.served.verifications
        for reason in (target, length):
            if reason.found:
                return [Check("drafting", None, f"not judged while {reason.cause} differs; mend it and run again")]
        if self.served.others:
            said = "not judged: others used the engine meanwhile, and its counters are of all"
            return [Check("drafting", None, said)]
        draws = self.check_draws()
        if draws.found or self._fits(served, self.replay):
            tau, ours = self._tau(served), self._tau(self.replay)
            said = f"on these texts the engine has τ {tau:.3f}, and the replay here {ours:.3f}"
            return [draws] if draws.found else [draws, Check("drafting", False, said)]
        cache = self.check_cache()
        if cache.found:
            return [draws, cache]
        if self.folder:
            return [draws, cache, *self._of_folder()]
        return [draws, cache, self.check_drafter()]

    def _of_folder(self) -> list[Check]:
        checks = self.check_folder()
        if any(check.found for check in checks):
            return checks
        told = "the folder is right, and the engine drafts otherwise all the same"
        return [*checks, Check("engine", True, told, "Try another version of the engine, and report it there.")]

    def explain(self, ours: Sequence[AcceptanceReport], prompts: Check) -> dict[str, Any]:
        """
        The difference, and every check.

        Args:
            ours (`Sequence[AcceptanceReport]`): By prompt, our measurement.
            prompts ([`Check`]): Of the prompts.

        Returns:
            JSON-able `dict`: `difference` (τ of the engine less ours, `mean`, `low`, `high`), `written` and `drafted`
            (its two parts), `replayed` (τ of the drafter along the engine's texts), `checks`.
        """
        target, length = self.check_target(), self.check_length()
        checks = [prompts, target, length, *self._drafting(target, length)]
        committed = self.served.by_part([report.committed[0] for report in ours])
        verifications = self.served.by_part([report.verifications[0] for report in ours])
        change = self._change(self.served.verifications, verifications, committed)
        replayed = self._tau(self.replay)
        own = float(committed.sum() / verifications.sum().clamp(min=1))
        return {
            "difference": dict(zip(("mean", "low", "high"), change, strict=True)),
            "written": replayed - own,
            "drafted": self.served.acceptance_length - replayed,
            "replayed": replayed,
            "checks": [asdict(check) for check in checks],
        }


def served_folder(named: str | None, started: dict[str, Any]) -> str | None:
    """Folder of the drafter that an engine was started with: as named, or as the engine says, where it is here too."""
    told = started.get("speculative_draft_model_path")
    return named or (told if isinstance(told, str) and Path(told, "config.json").is_file() else None)


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and torch.equal(ours.cpu(), theirs.to(ours.dtype).cpu())


def _moved(taps: list[int], bound: int) -> list[list[int]]:
    """Taps one layer off: all of them, as where layers are counted from another end, or a single one."""
    moved = [[tap + step for tap in taps] for step in (1, -1)]
    moved += [[*taps[:i], taps[i] + step, *taps[i + 1 :]] for i in range(len(taps)) for step in (1, -1)]
    inside = [layers for layers in moved if layers and all(0 <= layer < bound for layer in layers)]
    return [list(layers) for layers in dict.fromkeys(map(tuple, inside))]


def _masks(tokenizer: PreTrainedTokenizerBase, mask: int | None, vocab_size: int) -> list[int]:
    """Tokens that a tool or a hand may have taken for the mask token."""
    if mask is None:
        return []
    named = [getattr(tokenizer, f"{name}_token_id", None) for name in ("mask", "pad", "eos", "unk", "bos")]
    guesses = [*named, 0, mask - 1, mask + 1, len(tokenizer) - 1, vocab_size - 1, *tokenizer.added_tokens_decoder]
    known = [token for token in guesses if token is not None and 0 <= token < vocab_size and token != mask]
    return list(dict.fromkeys(known))[:NUM_MASKS]


@contextmanager
def _mask_of(drafter: Drafter, token: int) -> Iterator[None]:
    """A drafter that takes another token for its mask, for a while."""
    own, drafter.mask_token_id = drafter.mask_token_id, token
    try:
        yield
    finally:
        drafter.mask_token_id = own
