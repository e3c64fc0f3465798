"""A new drafter for a target, ready to train: mask token, taps, shape, draft vocabulary, and where its weights start.

Everything that can be told from configs, tokenizer and prompts is told before the target's weights are read. Knows no
drafter kinds: what one can be given are the options of its config's `from_target`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..core.checks import Within, check_value, one_of
from ..core.errors import InputError, InputTypeError, UserError
from ..core.files import atomic_folder, check_new_folder
from ..core.target import Target, stop_token_ids
from ..core.target_shape import TargetShape
from ..core.vocabulary import DraftVocabulary, draft_vocabulary
from ..decoding.speculation import SpeculationSettings
from ..drafters import DRAFTERS
from ..drafters.base import Drafter
from ..evaluation.measure import measure_acceptance
from ..folders.adapters import is_adapter
from ..folders.checkpoints import (
    CONFIG_FAULTS,
    drafter_folder,
    load_drafter,
    load_target_shape,
    read_config,
)
from ..folders.folder_files import one_line
from ..folders.target_folder import read_target_config, read_tokenizer
from ..texts.mask_token import MaskToken, MaskTokens
from ..texts.prompts import check_fit, tokenize_dataset
from ..texts.rows import load_prompts
from .loading import load_pair


# A target this many times as deep has one more draft layer: 5 for 25 layers and more, as published drafters have.
_LAYERS_A_DRAFT_LAYER = 5


@dataclass
class NewDrafter:
    """
    What was made, and why so.

    Args:
        drafter ([`Drafter`]): Not bound to a target, unless it was made from it.
        start (`str`): Where its weights start, in words.
        mask_token ([`MaskToken`], *optional*): Of kinds that have one.
        vocabulary ([`DraftVocabulary`], *optional*): What it can propose, if that was counted.
        notes (`list[str]`, *optional*): What the user should know beside it.
    """

    drafter: Drafter
    start: str
    mask_token: MaskToken | None = None
    vocabulary: DraftVocabulary | None = None
    notes: list[str] = field(default_factory=list)


def new_drafter(
    target: str,
    kind: str,
    output_dir: str,
    from_drafter: str | None = None,
    prompts: str | None = None,
    options: Mapping[str, Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    num_prompts: int = 512,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> NewDrafter:
    """
    Make the folder of a new drafter.

    Args:
        target (`str`): Path or id of what it will draft for.
        kind (`str`): Key in `DRAFTERS`.
        output_dir (`str`): New folder; it appears when it is complete.
        from_drafter (`str`, *optional*): Path or id of a drafter of that kind, which is copied once it is known to
            fit; of one of another kind that this kind can start from; or of a small language model, for a kind that
            takes one. The target's last layers by default.
        prompts (`str`, *optional*): Prompts as [`load_prompts`] takes them. The mask token is held against all of
            them, and where a draft vocabulary is to be chosen the target writes its answers to the first.
        options (`Mapping`, *optional*): Of the config's `from_target`. `mask_token_id` may be the token's text;
            `draft_vocab_size` says how many tokens a draft vocabulary has.
        chat_template_kwargs (`dict`, *optional*): For the chat template.
        num_prompts, max_new_tokens (`int`, *optional*, default to `512`): Answers that the target writes, at most, and
            the longest of them.
        seed (`int`, *optional*, defaults to `0`): Of weights that start at random.

    Raises:
        `FileExistsError`: `output_dir` is there and not empty.
        `TypeError`: An option that there is not.
        `ValueError`: A value that cannot be, a drafter that does not fit, or no token that can be the mask.
    """
    kind = check_value("kind", kind, str, one_of(*DRAFTERS))
    check_new_folder(output_dir)
    config = read_target_config(target)
    shape, tokenizer = load_target_shape(target), read_tokenizer(target, config)
    rows = None
    if prompts is not None:
        rows = tokenize_dataset(load_prompts(prompts), tokenizer, None, chat_template_kwargs, name=prompts)
    task = _Task(target, DRAFTERS[kind], shape, tokenizer, rows, num_prompts, max_new_tokens)
    torch.manual_seed(seed)
    options = dict(options or {})
    made = task.from_nothing(options) if from_drafter is None else task.from_drafter(from_drafter, options)
    with atomic_folder(output_dir) as part:
        made.drafter.save_pretrained(part)
        load_drafter(str(part))  # as whoever trains it will
    return made


@dataclass
class _Task:
    """What is known before anything is made; see [`new_drafter`]."""

    target: str
    drafter_class: type[Drafter]
    shape: TargetShape
    tokenizer: PreTrainedTokenizerBase
    rows: Dataset | None
    num_prompts: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        self.kind = self.drafter_class.kind
        self.parameters = inspect.signature(self.drafter_class.config_class.from_target).parameters

    # -- from the target ----------------------------------------------------------------------------------------------

    def from_nothing(self, options: dict[str, Any]) -> NewDrafter:
        """A drafter of the target's shape, started from its last layers where they fit."""
        self._refuse_a_plain_model_without_shape(options)
        mask = None
        if "mask_token_id" in self.parameters:
            mask = self._mask_tokens().choose(options.pop("mask_token_id", None))
            options["mask_token_id"] = mask.id
        if "num_hidden_layers" in self.parameters:
            usual = self.parameters["num_hidden_layers"].default
            options.setdefault("num_hidden_layers", min(usual, max(1, self.shape.num_layers // _LAYERS_A_DRAFT_LAYER)))
        size, notes = self._vocabulary_size(options)
        self._check_shape(options)
        target, _, _ = load_pair([], self.target, "auto")
        vocabulary = None
        if size is not None:
            vocabulary = self._count(target, size)
            options["draft_token_ids"] = vocabulary.token_ids
        drafter = self.drafter_class.made_for(target, init_from_target=False, **options)
        at_random = _checksums(drafter)
        drafter.init_from_target(target)
        taken = {name for name, value in _checksums(drafter).items() if value != at_random[name]}
        share = _size(drafter, taken) / _size(drafter)
        start = f"the target's last layers ({share:.0%} of its weights{', the rest at random' if share < 1 else ''})"
        return NewDrafter(drafter, start if taken else "random weights", mask, vocabulary, notes)

    def _refuse_a_plain_model_without_shape(self, options: dict[str, Any]) -> None:
        """A kind that is a whole language model learns in hours what a small model of the family knows already."""
        if not self.drafter_class.code_travels and not options.keys() - {"num_draft_tokens"}:
            raise InputError(
                f"A {self.kind} drafter is a whole small language model, and none was given. Give one with the "
                "target's tokenizer (--from SMALL_MODEL); or a shape for a new one, such as --set num_hidden_layers=2."
            )

    def _mask_tokens(self) -> MaskTokens:
        config = read_target_config(self.target)
        try:
            generation = GenerationConfig.from_pretrained(self.target)
        except OSError:  # there is none, and its fields stand in the config
            generation = None
        return MaskTokens(self.tokenizer, config, generation, () if self.rows is None else self.rows["prompt_ids"])

    def _vocabulary_size(self, options: dict[str, Any]) -> tuple[int | None, list[str]]:
        """How many tokens the drafter shall propose, `None` where all of them; and what is to be said of it."""
        if "draft_token_ids" not in self.parameters:
            return None, []
        whole, usual = self.shape.vocab_size, self.drafter_class.config_class.usual_draft_vocab_size
        given = check_value("draft_vocab_size", options.pop("draft_vocab_size", None), int | None, Within(1, whole))
        size = given or min(usual or whole, whole)
        if size == whole:
            return None, []
        if self.rows is not None:
            answered = self.rows.select(range(min(self.num_prompts, len(self.rows))))
            check_fit({"prompts": answered}, whole, self.shape.context_length, self.max_new_tokens, 0)
            return size, []
        if given is None:
            return None, [
                f"It can propose all {whole} tokens. Published drafters of this kind propose {size}: with --prompts "
                "the target writes texts, and their most frequent tokens are taken."
            ]
        raise InputError(
            f"draft_vocab_size={size} says how many tokens, and texts say which. Give --prompts, which the target "
            "answers; or leave it out for the whole vocabulary."
        )

    def _check_shape(self, options: dict[str, Any]) -> None:
        """Build it without memory, before the target's weights are read."""
        config_class = self.drafter_class.config_class
        try:
            config = config_class.from_target(self.shape.config, **options)
            with torch.device("meta"):
                self.drafter_class(config).check_target(self.shape)
        except UserError:
            raise
        except CONFIG_FAULTS as error:
            raise InputError(
                f"No {self.kind} drafter of the shape {options} can be made for {self.target} ({one_line(error)}). "
                "Correct --set."
            ) from error

    def _count(self, target: Target, size: int) -> DraftVocabulary:
        """The most frequent tokens of texts that the target writes, alone and greedily."""
        stops = stop_token_ids(target.model, self.tokenizer)
        prompts = list(self.rows[: self.num_prompts]["prompt_ids"])
        settings = SpeculationSettings(self.max_new_tokens, stops, batch_size=min(len(prompts), 32))
        written = measure_acceptance(target, None, prompts, settings, progress="The target writes texts")
        keep = {token for token in (*self.tokenizer.all_special_ids, *stops) if token < target.vocab_size}
        return draft_vocabulary(written.completions, target.vocab_size, size, keep)

    # -- from what is there -------------------------------------------------------------------------------------------

    def from_drafter(self, path: str, options: dict[str, Any]) -> NewDrafter:
        """A copy, or what this kind makes of a drafter of another kind or of a plain model."""
        folder = drafter_folder(path)
        if not is_adapter(folder) and self.drafter_class.can_adopt(read_config(folder)):
            self._refuse(options.keys() - {"num_draft_tokens"}, f"the model {path} is taken as it is")
            drafter = self.drafter_class.adopt(str(folder), self.shape, **options)
            return self._fitted(drafter, f"the model {path}")
        origin = load_drafter(path, "auto")
        if origin.kind == self.kind:
            self._refuse(options.keys(), f"the {self.kind} drafter {path} is copied as it is")
            return self._fitted(origin, f"a copy of {path}")
        self._refuse(options.keys() & {"mask_token_id"}, f"its slots are those of the {origin.kind} drafter {path}")
        drafter = self.drafter_class.from_drafter(origin, **options)
        return self._fitted(drafter, f"the {origin.kind} drafter {path}")

    @staticmethod
    def _refuse(options: set[str], why: str) -> None:
        if options:
            raise InputTypeError(f"--set gives {', '.join(sorted(options))}, but {why}. Leave that out.")

    def _fitted(self, drafter: Drafter, start: str) -> NewDrafter:
        drafter.fit(self.shape)
        made, token_id = NewDrafter(drafter, start), getattr(drafter.config, "mask_token_id", None)
        if token_id is not None:
            tokens = self._mask_tokens()
            made.mask_token = MaskToken(token_id, tokens.names.get(token_id), "as it was trained")
            # It has learnt to fill slots that hold this token; another one would be a new start.
            if fault := tokens.fault(token_id):
                made.notes.append(f"Its mask token {token_id} is one that texts can hold: {fault}.")
        return made


def _checksums(drafter: Drafter) -> dict[str, float]:
    return {name: parameter.detach().double().square().sum().item() for name, parameter in drafter.named_parameters()}


def _size(drafter: Drafter, names: set[str] | None = None) -> int:
    return sum(value.numel() for name, value in drafter.named_parameters() if names is None or name in names)
