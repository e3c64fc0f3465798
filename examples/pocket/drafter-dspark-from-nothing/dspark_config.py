"""
The DSpark config in the flat layouts of DeepSpec and SpecForge and as `speculators` writes it; every unknown request
refused.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, Qwen3Config

from .errors import InputError
from .drafter_config import DrafterConfig
from .fields import check_fields, check_heads
from .own_vocabulary import check_tokens_are_named, draft_vocab_size_of
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


MARKOV_HEADS = ("vanilla", "gated", "rnn")
# What stands at the top level in DeepSpec's folders, and in `dflash_config`, which goes first, in SpecForge's.
_OWN = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers", "markov_rank", "markov_head_type")
_OWN += ("enable_confidence_head", "confidence_head_with_markov", "sample_from_anchor")
# Of those, what `speculators` keeps beside the layer's config under the same name.
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_BESIDE = ("mask_token_id", "sample_from_anchor", "draft_vocab_size")
# What engines take for granted where one of these does not stand at the top level.
_ASSUMED = {"markov_rank": None, "markov_head_type": "vanilla", "sample_from_anchor": True}
# Fields of `dflash_config` that change nothing of what is computed.
_IDLE = {"projector_type", "attention_mode", "confidence_head_alpha", "num_anchors", "use_aux_hidden_state"}


class DSparkConfig(DrafterConfig, Qwen3Config):
    """
    Flat DSpark config.

    Args:
        block_size (`int`, *optional*, defaults to `7`):
            Slots of a block. All of them propose, so it is K; without `sample_from_anchor` it is K + 1.
        mask_token_id (`int`, *optional*):
            Token that stands for a slot to fill.
        target_layer_ids (`list[int]`, *optional*):
            Taps: outputs of those layers, counted from 0. They follow from `num_target_layers` by default.
        num_target_layers (`int`, *optional*):
            Depth of the target.
        markov_rank (`int`, *optional*, defaults to `256`):
            Rank of the bias by the token before.
        markov_head_type (`str`, *optional*, defaults to `"vanilla"`):
            `"vanilla"`: the bias reads that token alone. `"gated"`: the slot's state gates it. `"rnn"`: it remembers
            the slots before.
        enable_confidence_head (`bool`, *optional*, defaults to `True`):
            Whether a head learns how likely each proposal is accepted.
        confidence_head_with_markov (`bool`, *optional*, defaults to `True`):
            Whether it reads the token before, too.
        sample_from_anchor (`bool`, *optional*, defaults to `True`):
            Whether the anchor's slot proposes, each slot the token after its position. If not, each slot but the
            anchor's proposes the token at its position.
        draft_vocab_size (`int`, *optional*):
            Tokens that can be proposed; the target's whole vocabulary by default.
        draft_token_ids (`list[int]`, *optional*):
            Target ids of the draft vocabulary, ascending. Not written: the buffers `d2t` and `t2d` hold them.
        dflash_config (`dict`, *optional*):
            Holds the same fields in folders of SpecForge.
        kwargs:
            [`~transformers.Qwen3Config`] fields.

    Raises:
        `ValueError`: A field asks for something that is not computed here.
    """

    # The worker captures a target's states as it does for DFlash.
    served_targets = {"SGLang": BLOCKS_IN_SGLANG, "vLLM": TAPPED_BY_VLLM}

    def __init__(
        self,
        block_size: int | None = None,
        mask_token_id: int | None = None,
        target_layer_ids: list[int] | None = None,
        num_target_layers: int | None = None,
        markov_rank: int | None = None,
        markov_head_type: str | None = None,
        enable_confidence_head: bool | None = None,
        confidence_head_with_markov: bool | None = None,
        sample_from_anchor: bool | None = None,
        draft_vocab_size: int | None = None,
        draft_token_ids: list[int] | None = None,
        dflash_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = locals()
        own = {name: given[name] for name in _OWN}
        check_fields({**own, "draft_vocab_size": draft_vocab_size, "dflash_config": dflash_config, **kwargs})
        inner = dflash_config or {}
        own |= {name: inner[name] for name in _OWN if inner.get(name) is not None}
        kwargs.setdefault("architectures", ["Qwen3DSparkModel"])
        # DeepSpec's class refuses a config without; nothing here reads it.
        kwargs.setdefault("num_anchors", 512)
        kwargs["tie_word_embeddings"] = False  # A copied target's may be; there is nothing to tie.
        kwargs["model_type"] = "qwen3"
        super().__init__(**kwargs)
        check_heads(self)
        self.draft_token_ids = draft_token_ids
        self.draft_vocab_size = draft_vocab_size_of(draft_token_ids, draft_vocab_size, self.vocab_size)

        def settled(name: str, default: Any) -> Any:
            return default if own[name] is None else own[name]

        self.block_size = settled("block_size", 7)
        self.mask_token_id, self.num_target_layers = own["mask_token_id"], own["num_target_layers"]
        depth = self.num_target_layers
        self.target_layer_ids = settled(
            "target_layer_ids", default_layer_ids(depth, self.num_hidden_layers) if depth else []
        )
        self.markov_rank = settled("markov_rank", 256)
        self.markov_head_type = settled("markov_head_type", "vanilla").lower()
        self.enable_confidence_head = settled("enable_confidence_head", True)
        self.confidence_head_with_markov = settled("confidence_head_with_markov", True)
        self.sample_from_anchor = settled("sample_from_anchor", True)
        self._check_features(inner, kwargs)

    def _check_features(self, inner: dict[str, Any], kwargs: dict[str, Any]) -> None:
        asked = {f"dflash_config.{name}": inner[name] for name in inner if inner[name] and name not in {*_OWN, *_IDLE}}
        if inner.get("use_aux_hidden_state") is False:
            asked["dflash_config.use_aux_hidden_state"] = False
        if self.markov_head_type not in MARKOV_HEADS:
            asked["markov_head_type"] = self.markov_head_type
        # A drafter that lies in its target's checkpoint has a prefix, and another backbone.
        asked |= {name: value for name, value in kwargs.items() if name.startswith("dspark_") and value}
        if self.draft_vocab_size > self.vocab_size:
            asked["draft_vocab_size"] = self.draft_vocab_size
        asked |= uncomputed_block(self)
        if asked:
            raise InputError(
                f"This DSpark config asks for what is not computed here: {asked}. Take a drafter without it; if a "
                "field changes nothing in this one, remove it from config.json."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("draft_token_ids", None)
        if self.draft_vocab_size == self.vocab_size:
            output.pop("draft_vocab_size", None)
        return with_rope_fields(output)

    @classmethod
    def from_speculators(cls, config: dict[str, Any]) -> DSparkConfig:
        """From the `config.json` of a `speculators` folder, whose taps count `hidden_states`."""
        layer = speculators_layer(config, "block_size", "aux_hidden_state_layer_ids", "mask_token_id", *_HEADS[:2])
        fields = {name: config.get(name) for name in ("block_size", *_BESIDE, *_HEADS)}
        taps = [index - 1 for index in config["aux_hidden_state_layer_ids"]]
        # Folders without the field are older than it, of when the anchor's slot was silent; vLLM reads them so too.
        fields["sample_from_anchor"] = fields["sample_from_anchor"] or False
        return cls(**{**layer, **fields}, target_layer_ids=taps)

    def to_speculators(self) -> dict[str, Any]:
        """What the `config.json` of a `speculators` folder says of this drafter."""
        return {
            "architectures": ["DSparkDraftModel"],
            "speculators_model_type": "dspark",
            **speculators_block(self, *_BESIDE, "target_layer_ids", *_HEADS),
            **{name: getattr(self, name) for name in (*_BESIDE, *_HEADS)},
        }

    @classmethod
    def layout(cls, written: dict[str, Any]) -> str:
        return "flat, as SpecForge writes it" if written.get("dflash_config") else super().layout(written)

    @classmethod
    def sglang_flags(cls, kind: str, num_draft_tokens: int) -> list[str]:
        # SGLang takes `block_size` for K, which it is not where the anchor's slot does not propose.
        return [*super().sglang_flags(kind, num_draft_tokens), f"--speculative-dspark-block-size {num_draft_tokens}"]

    @staticmethod
    def engine_faults(written: dict[str, Any], names: set[str]) -> list[tuple[str, set[str]]]:
        faults = layer_faults(written)
        inner, both = written.get("dflash_config") or {}, {"SGLang", "vLLM"}
        nested = [
            name
            for name, assumed in _ASSUMED.items()
            if written.get(name) is None and inner.get(name) not in (None, assumed)
        ]
        head = written.get("markov_head_type") or inner.get("markov_head_type")
        if nested:
            faults.append((f"{nested} stand in dflash_config alone, and engines read them at the top level", both))
        if not (written.get("markov_rank") or inner.get("markov_rank")):
            faults.append(("there is no markov_rank, and engines assume none", both))
        if head is None:
            faults.append(("there is no markov_head_type, without which SGLang stops", {"SGLang"}))
        elif head != "vanilla":
            faults.append(("its Markov head is not vanilla, the only one that vLLM computes", {"vLLM"}))
        if "sample_from_anchor" not in written and "speculators_model_type" in written:
            told = "there is no sample_from_anchor: vLLM takes it for false, the speculators library for true"
            faults.append((told, set()))
        vocabulary = (written.get("transformer_layer_config") or written).get("vocab_size")
        own_vocabulary = written.get("draft_vocab_size") not in (None, vocabulary)
        if own_vocabulary:
            faults.append(("it has a draft vocabulary, which SGLang does not read for this kind", {"SGLang"}))
        if written.get("model_type") == "dspark":
            faults.append(("model_type is 'dspark', of which engines know no config: they want 'qwen3'", both))
        if written.get("enable_confidence_head") is None:
            faults.append(("there is no enable_confidence_head, so vLLM leaves the confidence head out", set()))
        elif written["enable_confidence_head"] and written.get("confidence_head_with_markov") is None:
            told = "there is no confidence_head_with_markov, which vLLM then takes for false"
            faults.append((told, set() if inner.get("confidence_head_with_markov") is False else {"vLLM"}))
        if ({"embed_tokens.weight"} if own_vocabulary else {"embed_tokens.weight", "lm_head.weight"}) & names:
            faults.append(("there are embeddings or a head, in place of which SGLang takes the target's", set()))
        return faults

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        mask_token_id: int,
        block_size: int = 7,
        num_hidden_layers: int = 5,
        target_layer_ids: list[int] | None = None,
        markov_rank: int = 256,
        draft_token_ids: list[int] | None = None,
        **overrides: Any,
    ) -> DSparkConfig:
        """
        A drafter config shaped after its target (Qwen3-, Llama- or Gemma3-like).

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): The target's (text) config.
            mask_token_id (`int`): Token that stands for a slot to fill; must lie inside the target's vocabulary.
            block_size (`int`, *optional*, defaults to `7`): K.
            num_hidden_layers (`int`, *optional*, defaults to `5`): Draft layers.
            target_layer_ids (`list[int]`, *optional*): Taps; evenly spaced by default.
            markov_rank (`int`, *optional*, defaults to `256`): Rank of the bias by the token before.
            draft_token_ids (`list[int]`, *optional*): See [`draft_vocabulary`]; the whole vocabulary by default.
            overrides: Further config fields.

        Raises:
            `TypeError`: There is no such field.
            `ValueError`: The size of a draft vocabulary without its tokens.
        """
        cls.check_options(overrides)
        check_tokens_are_named(draft_token_ids, overrides.get("draft_vocab_size"), target_config.vocab_size)
        own = {"mask_token_id": mask_token_id, "block_size": block_size, "markov_rank": markov_rank}
        own["draft_token_ids"] = draft_token_ids
        own |= {"target_layer_ids": target_layer_ids, "num_target_layers": target_config.num_hidden_layers}
        return cls(**{**shape_of(target_config), "num_hidden_layers": num_hidden_layers, **own, **overrides})
