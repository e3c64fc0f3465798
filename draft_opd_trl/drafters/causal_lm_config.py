"""The config of a causal language model that drafts: the plain model's, and how many tokens it proposes.

What cannot be drafted with is refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.errors import InputError
from ..core.target_shape import TargetShape
from .drafter_config import DrafterConfig
from .fields import check_fields, check_heads
from .parts import KNOWN_TARGETS, uncomputed_rope


def _of_lm(name: str) -> property:
    """A field of the plain model's config."""
    return property(lambda self: getattr(self.lm, name), lambda self, value: setattr(self.lm, name, value))


class CausalLMConfig(DrafterConfig, PreTrainedConfig):
    """
    A plain model's config, and the one thing that it does not say.

    Args:
        num_draft_tokens (`int`, *optional*, defaults to `4`):
            K, proposals a block. In a `config.json` this field tells a drafter from any other model; whoever reads the
            plain model leaves it alone.
        model_type (`str`, *optional*, defaults to `"qwen3"`):
            A causal LM of transformers.
        fields:
            Of that type's config.

    Raises:
        `ValueError`: It asks for something that is not computed here.
    """

    # The engines ask nothing of a target that they would not for plain decoding.
    served_targets = {"SGLang": KNOWN_TARGETS, "vLLM": KNOWN_TARGETS}
    card_notes = "`target.generate(..., assistant_model=drafter)` decodes with it in transformers, one text at a time."
    free_length = True

    def __init__(self, num_draft_tokens: int = 4, model_type: str = "qwen3", **fields: Any) -> None:
        check_fields({"num_draft_tokens": num_draft_tokens, **fields})
        if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise InputError(f"model_type {model_type!r} is no causal language model of transformers. Take one.")
        super().__init__()
        self.model_type, self.num_draft_tokens = model_type, num_draft_tokens or 4
        self.lm = AutoConfig.for_model(model_type, **fields)
        self._check_lm()

    def _check_lm(self) -> None:
        rope = getattr(self.lm, "rope_parameters", None)
        asked = {} if rope else {"positions": "learned, or none"}
        # One for all layers, or one a layer type.
        for part in (rope or {}, *(rope or {}).values()):
            asked |= uncomputed_rope(part) if isinstance(part, dict) else {}
        if other := self.shape.layer_types - {"full_attention", "sliding_attention"}:
            asked["layer_types"] = sorted(other)
        if self.lm.get_text_config() is not self.lm:
            asked["more than text"] = True
        if asked:
            raise InputError(
                f"A {self.lm.model_type} model asks for {asked}, which cannot be drafted with here: a key must stay "
                "what it is, whatever comes after. Take a model of full or sliding attention over text, with RoPE of "
                "type default, linear, llama3 or yarn."
            )
        check_heads(self.lm)

    @classmethod
    def from_target(
        cls, target_config: PreTrainedConfig, num_draft_tokens: int = 4, num_hidden_layers: int = 2, **overrides: Any
    ) -> CausalLMConfig:
        """
        A model of the target's own type with few layers.

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): Of the (text) target.
            num_draft_tokens (`int`, *optional*, defaults to `4`): K, proposals a block.
            num_hidden_layers (`int`, *optional*, defaults to `2`): Layers, of the types of the target's last ones.
            overrides: Further fields of the target's config.
        """
        theirs = target_config.to_dict()
        cls.check_options(overrides, theirs)
        for name in ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version"):
            theirs.pop(name, None)
        if theirs.get("layer_types"):
            theirs["layer_types"] = theirs["layer_types"][-num_hidden_layers:]
        return cls(num_draft_tokens, **{**theirs, "num_hidden_layers": num_hidden_layers, **overrides})

    # -- what is asked of every drafter's config ------------------------------------------------------------------

    vocab_size = _of_lm("vocab_size")
    hidden_size = _of_lm("hidden_size")
    num_hidden_layers = _of_lm("num_hidden_layers")
    max_position_embeddings = _of_lm("max_position_embeddings")
    tie_word_embeddings = _of_lm("tie_word_embeddings")
    rope_parameters = _of_lm("rope_parameters")

    @property
    def shape(self) -> TargetShape:
        """Its types of layers and the window of those that slide."""
        return TargetShape(self.lm)

    # -- the plain model's folder -----------------------------------------------------------------------------------

    @property
    def ties(self) -> dict[str, str]:
        """Tensors that are others: the head's name → the embedding's, where it is one."""
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.lm)]
        return dict(model_class._tied_weights_keys or {}) if self.lm.tie_word_embeddings else {}

    def _as_written(self, fields: dict[str, Any]) -> dict[str, Any]:
        plain = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]]
        dtype = str(self.dtype or torch.float32).removeprefix("torch.")
        return {**fields, "architectures": plain, "dtype": dtype, "num_draft_tokens": self.num_draft_tokens}

    def to_dict(self) -> dict[str, Any]:
        return self._as_written(self.lm.to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        return self._as_written(self.lm.to_diff_dict())

    @classmethod
    def layout(cls, written: dict[str, Any]) -> str:
        return "a plain model of transformers"

    # -- engines ----------------------------------------------------------------------------------------------------

    @classmethod
    def sglang_flags(cls, kind: str, num_draft_tokens: int) -> list[str]:
        return [
            "--speculative-algorithm STANDALONE",
            f"--speculative-num-steps {num_draft_tokens}",
            "--speculative-eagle-topk 1",
            f"--speculative-num-draft-tokens {num_draft_tokens + 1}",
        ]

    @classmethod
    def vllm_config(cls, kind: str, num_draft_tokens: int) -> dict[str, Any]:
        return {"method": "draft_model", "num_speculative_tokens": num_draft_tokens}
