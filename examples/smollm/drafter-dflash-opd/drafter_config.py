"""What the config of every drafter kind declares, beside the fields of the transformers config it is made of.

Engines, folders and cards ask here, so that nothing outside `drafters/` names a kind. Knows no drafter kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .errors import InputError, InputTypeError


class DrafterConfig:
    """
    A mixin over a transformers config: `class MyConfig(DrafterConfig, Qwen3Config)`. A kind must have `from_target`;
    the rest has defaults.

    Attributes:
        served_targets (`dict[str, frozenset[str]]`):
            Engine (`"SGLang"`, `"vLLM"`) → `model_type` of the targets that it serves with this kind. An engine that
            is not there is not known to serve any.
        card_notes (`str`):
            What the model card says of this kind alone, as Markdown.
        usual_draft_vocab_size (`int`, *optional*):
            Tokens that published drafters of this kind can propose, where their targets have more; `None` where that
            is all of them.
        free_length (`bool`):
            Whether an engine may be told fewer proposals a block than the config's `num_draft_tokens`: a chain, which
            drafts one token after the other and the same whatever comes behind.
    """

    served_targets: ClassVar[dict[str, frozenset[str]]] = {}
    card_notes: ClassVar[str] = ""
    usual_draft_vocab_size: ClassVar[int | None] = None
    free_length: ClassVar[bool] = False

    @classmethod
    def from_target(cls, target_config: PreTrainedConfig, **options: Any) -> DrafterConfig:
        """A config shaped after that of its target; its named options are those of `create_drafter`."""
        raise NotImplementedError(f"{cls.__name__} has no from_target.")

    @classmethod
    def check_options(cls, options: Iterable[str], fields: Iterable[str] | None = None) -> None:
        """
        Refuse options that no config field answers to; transformers' configs would keep them without a word.

        Args:
            options (`Iterable[str]`): Names of what is passed on to the config.
            fields (`Iterable[str]`, *optional*): Names of its fields; by default those of the transformers config
                that it is made of.

        Raises:
            `TypeError`: There is no such field.
        """
        parameters = signature(cls.from_target).parameters
        own = [name for name in parameters if name not in ("target_config", "overrides", "options")]
        if fields is None:
            plain = (parent for parent in cls.__mro__ if not issubclass(parent, DrafterConfig))
            fields = next(parent for parent in plain if issubclass(parent, PreTrainedConfig))().to_dict()
        known = {*own, *signature(cls.__init__).parameters, *fields} - {"self", "kwargs"}
        for name in options:
            if name not in known:
                near = get_close_matches(name, own, 1, 0.7) or get_close_matches(name, sorted(known), 1, 0.7)
                hint = (
                    f"Did you mean {near[0]!r}?" if near else f"It takes {', '.join(own)}, and fields of the config."
                )
                raise InputTypeError(f"{cls.__name__} has no option {name!r}. {hint}")

    @classmethod
    def from_speculators(cls, config: dict[str, Any]) -> DrafterConfig:
        """
        From the `config.json` of a `speculators` folder.

        Raises:
            `ValueError`: This kind has no such layout.
        """
        raise InputError(f"A {cls.__name__} has no speculators layout, so this config.json is no drafter's.")

    def to_speculators(self) -> dict[str, Any]:
        """
        What the `config.json` of a `speculators` folder says of this drafter.

        Raises:
            `ValueError`: This kind has no such layout.
        """
        raise InputError(f"A {type(self).__name__} has no speculators layout. Give the drafter's kind as the format.")

    @classmethod
    def layout(cls, written: dict[str, Any]) -> str:
        """The name of the layout that a folder with this `config.json` is in, where it is not `speculators`."""
        return f"flat ({', '.join(cls.served_targets)})" if cls.served_targets else "flat"

    @staticmethod
    def engine_faults(written: dict[str, Any], names: set[str]) -> list[tuple[str, set[str]]]:
        """
        Where engines do otherwise than this package with a folder, in any layout that the kind reads.

        Args:
            written (`dict`): Its `config.json`.
            names (`set[str]`): Its tensors.

        Returns:
            What is the matter, and the engines (`"SGLang"`, `"vLLM"`) that do not draft with it as trained.
        """
        return []

    @classmethod
    def sglang_flags(cls, kind: str, num_draft_tokens: int) -> list[str]:
        """What `sglang.launch_server` is told beside the two models: its algorithm, then whatever else it needs."""
        return [f"--speculative-algorithm {kind.upper()}"]

    @classmethod
    def vllm_config(cls, kind: str, num_draft_tokens: int) -> dict[str, Any]:
        """What `vllm serve --speculative-config` is told beside the drafter's path."""
        return {"method": kind, "num_speculative_tokens": num_draft_tokens}
