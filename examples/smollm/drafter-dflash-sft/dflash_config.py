"""The DFlash config in its published flat layout and as `speculators` writes it; every unknown request refused."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from .errors import InputError
from .drafter_config import DrafterConfig
from .fields import check_fields, check_heads
from .parts import (
    BLOCKS_IN_SGLANG,
    TAPPED_BY_VLLM,
    default_layer_ids,
    layer_faults,
    shape_of,
    speculators_block,
    speculators_layer,
    uncomputed_block,
    with_rope_fields,
)


# Fields of `dflash_config` that are computed here. Any other that asks for something is refused.
_KNOWN = {"mask_token_id", "target_layer_ids", "block_size", "num_target_layers", "use_aux_hidden_state"}


class DFlashConfig(DrafterConfig, Qwen3Config):
    """
    Flat DFlash config.

    Args:
        block_size (`int`, *optional*, defaults to `16`):
            Anchor plus proposals: K + 1. Newer folders keep it in `dflash_config`, which goes first.
        num_target_layers (`int`, *optional*):
            Depth of the target.
        dflash_config (`dict`, *optional*):
            `mask_token_id` and `target_layer_ids` (id = output of that layer, counted from 0).
        kwargs:
            [`~transformers.Qwen3Config`] fields.

    Raises:
        `ValueError`: A field asks for something that is not computed here.
    """

    served_targets = {"SGLang": BLOCKS_IN_SGLANG, "vLLM": TAPPED_BY_VLLM}
    card_notes = (
        '`target.generate(..., assistant_model=drafter, speculation_type="dflash")` then decodes with it, one text at '
        "a time, where both have the same dtype."
    )

    def __init__(
        self,
        block_size: int = 16,
        num_target_layers: int | None = None,
        dflash_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"block_size": block_size, "num_target_layers": num_target_layers, "dflash_config": dflash_config}
        check_fields({**own, **kwargs})
        kwargs.setdefault("architectures", ["DFlashDraftModel"])
        kwargs["tie_word_embeddings"] = False  # Some published folders copy the target's; there is nothing to tie.
        draft_vocab_size = kwargs.pop("draft_vocab_size", None)
        super().__init__(**kwargs)
        check_heads(self)
        self._check_features(dflash_config or {}, draft_vocab_size)
        known = {name: value for name, value in (dflash_config or {}).items() if name in _KNOWN}
        self.dflash_config = {name: value for name, value in known.items() if value is not None}
        self.block_size = self.dflash_config.get("block_size") or block_size or 16
        self.num_target_layers = self.dflash_config.get("num_target_layers") or num_target_layers
        if self.num_target_layers:
            taps = default_layer_ids(self.num_target_layers, self.num_hidden_layers)
            self.dflash_config.setdefault("target_layer_ids", taps)

    def _check_features(self, inner: dict[str, Any], draft_vocab_size: int | None) -> None:
        asked = {f"dflash_config.{name}": inner[name] for name in inner if inner[name] and name not in _KNOWN}
        if inner.get("use_aux_hidden_state") is False:
            asked["dflash_config.use_aux_hidden_state"] = False
        if draft_vocab_size not in (None, self.vocab_size):
            asked["draft_vocab_size"] = draft_vocab_size
        asked |= uncomputed_block(self)
        if asked:
            raise InputError(
                f"This DFlash config asks for what is not computed here: {asked}. Take a drafter without it; if a "
                "field changes nothing in this one, remove it from config.json."
            )

    @property
    def mask_token_id(self) -> int | None:
        return self.dflash_config.get("mask_token_id")

    @property
    def target_layer_ids(self) -> list[int]:
        return self.dflash_config.get("target_layer_ids") or []

    def to_dict(self) -> dict[str, Any]:
        return with_rope_fields(super().to_dict())

    @classmethod
    def from_speculators(cls, config: dict[str, Any]) -> DFlashConfig:
        """From the `config.json` of a `speculators` folder, whose taps count `hidden_states`."""
        return cls(
            **speculators_layer(config, "block_size", "aux_hidden_state_layer_ids", "mask_token_id"),
            block_size=config["block_size"],
            draft_vocab_size=config.get("draft_vocab_size"),
            dflash_config={
                "mask_token_id": config["mask_token_id"],
                "target_layer_ids": [index - 1 for index in config["aux_hidden_state_layer_ids"]],
                "sample_from_anchor": config.get("sample_from_anchor", False),
            },
        )

    def to_speculators(self) -> dict[str, Any]:
        """What the `config.json` of a `speculators` folder says of this drafter."""
        return {
            "architectures": ["DFlashDraftModel"],
            "speculators_model_type": "dflash",
            **speculators_block(self, "dflash_config"),
            "sample_from_anchor": False,
        }

    @staticmethod
    def engine_faults(written: dict[str, Any], names: set[str]) -> list[tuple[str, set[str]]]:
        faults = layer_faults(written)
        if "speculators_model_type" in written:
            return faults
        inner = written.get("dflash_config") or {}
        if not inner.get("target_layer_ids"):
            faults.append(("dflash_config names no target_layer_ids: vLLM then taps EAGLE-3's layers", {"vLLM"}))
        if not inner.get("block_size") and not written.get("block_size"):
            faults.append(("there is no block_size, so 16 is assumed", set()))
        if written.get("tie_word_embeddings"):
            faults.append(("tie_word_embeddings is true, though there is nothing to tie", set()))
        return faults

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        mask_token_id: int,
        block_size: int = 16,
        num_hidden_layers: int = 5,
        target_layer_ids: list[int] | None = None,
        **overrides: Any,
    ) -> DFlashConfig:
        """
        A drafter config shaped after its target (Qwen3-, Llama- or Gemma3-like).

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): The target's (text) config.
            mask_token_id (`int`): Token that stands for a slot to fill; must lie inside the target's vocabulary.
            block_size (`int`, *optional*, defaults to `16`): K + 1.
            num_hidden_layers (`int`, *optional*, defaults to `5`): Draft layers.
            target_layer_ids (`list[int]`, *optional*): Taps; z-lab's spacing by default.
            overrides: Further config fields.

        Raises:
            `TypeError`: There is no such field.
        """
        cls.check_options(overrides)
        shape = {**shape_of(target_config), "num_hidden_layers": num_hidden_layers}
        return cls(
            block_size=block_size,
            num_target_layers=target_config.num_hidden_layers,
            dflash_config={
                "mask_token_id": mask_token_id,
                "target_layer_ids": target_layer_ids or None,
            },
            **{**shape, **overrides},
        )
