"""The EAGLE-3 config in its flat layout, taps in both spellings, and as `speculators` writes it; unknowns refused."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig

from .errors import InputError
from .drafter_config import DrafterConfig
from .fields import check_fields, check_heads
from .own_vocabulary import check_tokens_are_named, draft_vocab_size_of
from .parts import TAPPED_BY_VLLM, layer_faults, shape_of, speculators_layer, uncomputed_rope, with_rope_fields


NUM_TAPS = 3
# Fields that other writers leave behind and that change nothing of what is computed.
_IDLE_FIELDS = {"auto_map", "max_window_layers", "name_or_path", "rope_scaling", "rope_theta", "sliding_window"}
_IDLE_FIELDS |= {"target_model_type", "torch_dtype"}
# The only value of each that this architecture computes.
_ONLY_VALUES = {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False, "logit_scale": 1.0}
_ONLY_VALUES |= {"num_aux_hidden_states": NUM_TAPS, "layer_types": ["full_attention"]}
# What `speculators` keeps beside the layer's config, under the same names and in vLLM's count of taps.
_SPECULATORS_FIELDS = ("draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids")
_SPECULATORS_FIELDS += ("norm_output", "norm_before_residual", "fc_norm")
_NOT_IN_A_LAYER = {"_name_or_path", "architectures", "auto_map", "eagle_config", "num_draft_tokens", "own_embeddings"}
_NOT_IN_A_LAYER |= set(_SPECULATORS_FIELDS)


class Eagle3Config(DrafterConfig, LlamaConfig):
    """
    Flat EAGLE-3 config.

    Args:
        draft_vocab_size (`int`, *optional*):
            Tokens that can be proposed; the target's whole vocabulary by default.
        target_hidden_size (`int`, *optional*):
            Width of the target; `hidden_size` by default.
        num_draft_tokens (`int`, *optional*, defaults to `7`):
            K. Published configs leave it to the engine's launch; 7 is the depth they train to.
        eagle_aux_hidden_state_layer_ids (`list[int]`, *optional*):
            The three taps as indices of the target's `hidden_states` (0 is the embedding), as vLLM reads them. Unset,
            as in most published configs, they follow from the target's depth.
        eagle_config (`dict`, *optional*):
            Holds the taps as SGLang reads them: layers counted from 0, one less than above.
        norm_output (`bool`, *optional*, defaults to `False`):
            Feed back the normed hidden state (EAGLE 3.1).
        norm_before_residual (`bool`, *optional*, defaults to `False`):
            Take the residual after `hidden_norm`, not before it.
        fc_norm (`bool`, *optional*, defaults to `False`):
            Norm each tap before `fc` (EAGLE 3.1).
        own_embeddings (`bool`, *optional*):
            Whether the drafter has embeddings; by default only where its width is not the target's. `False` where
            those in its folder are a copy of the target's.
        draft_token_ids (`list[int]`, *optional*):
            Target ids of the draft vocabulary, ascending. Not written: the buffers `d2t` and `t2d` hold them.
        kwargs:
            [`~transformers.LlamaConfig`] fields.

    Raises:
        `ValueError`: A field asks for something that is not computed here, the two spellings of the taps disagree, or
            `draft_token_ids` leave the vocabulary.
    """

    # SGLang's `set_eagle3_layers_to_capture`; a target's class without it refuses to start. Gemma's raw embedding rows
    # are lent, without its scale, and this kind is drafted with those here too.
    served_targets = {
        "SGLang": frozenset(
            "apertus deepseek_v3 gemma3_text glm4_moe gpt_oss llama ministral3 mistral phi3 qwen2 qwen2_moe qwen3 "
            "qwen3_moe".split()
        ),
        "vLLM": TAPPED_BY_VLLM,
    }
    usual_draft_vocab_size = 32_000
    free_length = True

    def __init__(
        self,
        draft_vocab_size: int | None = None,
        target_hidden_size: int | None = None,
        num_draft_tokens: int = 7,
        eagle_aux_hidden_state_layer_ids: list[int] | None = None,
        eagle_config: dict[str, Any] | None = None,
        norm_output: bool = False,
        norm_before_residual: bool = False,
        fc_norm: bool = False,
        own_embeddings: bool | None = None,
        draft_token_ids: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        own = {"draft_vocab_size": draft_vocab_size, "target_hidden_size": target_hidden_size}
        own |= {"num_draft_tokens": num_draft_tokens, "norm_output": norm_output, "fc_norm": fc_norm}
        own |= {"eagle_aux_hidden_state_layer_ids": eagle_aux_hidden_state_layer_ids, "eagle_config": eagle_config}
        own |= {"norm_before_residual": norm_before_residual, "own_embeddings": own_embeddings}
        check_fields({**own, **kwargs})
        kwargs.setdefault("architectures", ["LlamaForCausalLMEagle3"])
        kwargs.setdefault("num_hidden_layers", 1)
        _check_features(kwargs, eagle_config or {})
        super().__init__(**kwargs)
        check_heads(self)
        self.draft_token_ids = draft_token_ids
        self.draft_vocab_size = draft_vocab_size_of(draft_token_ids, draft_vocab_size, self.vocab_size)
        self.target_hidden_size = target_hidden_size or self.hidden_size
        self.num_draft_tokens = num_draft_tokens or 7
        self.norm_output, self.norm_before_residual, self.fc_norm = norm_output, norm_before_residual, fc_norm
        self.own_embeddings = own_embeddings
        nested = (eagle_config or {}).get("eagle_aux_hidden_state_layer_ids")
        taps = eagle_aux_hidden_state_layer_ids or (nested and [index + 1 for index in nested])
        if nested and taps != [index + 1 for index in nested]:
            raise InputError(
                f"eagle_aux_hidden_state_layer_ids is {taps} at the top level and {nested} in eagle_config, where "
                "each must be one less. Correct the one that is wrong."
            )
        self.eagle_aux_hidden_state_layer_ids = taps

    @property
    def target_layer_ids(self) -> list[int] | None:
        """Taps as layers counted from 0; `None` until the target's depth is known."""
        taps = self.eagle_aux_hidden_state_layer_ids
        return None if taps is None else [index - 1 for index in taps]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output.pop("draft_token_ids", None)
        if not output.get("own_embeddings"):
            output.pop("own_embeddings", None)
        if not output.get("norm_output"):
            output.pop("norm_output", None)  # SpecForge skips the final norm wherever the field is written.
        if self.eagle_aux_hidden_state_layer_ids is not None:
            output["eagle_config"] = {
                "eagle_aux_hidden_state_layer_ids": self.target_layer_ids,
                "use_aux_hidden_state": True,
            }
        return with_rope_fields(output)

    @classmethod
    def from_speculators(cls, config: dict[str, Any]) -> Eagle3Config:
        """From the `config.json` of a `speculators` folder, as vLLM reads it."""
        layer = speculators_layer(config, "speculators_config")
        fields = {name: config[name] for name in _SPECULATORS_FIELDS if name in config}
        if config.get("norm_before_fc"):
            fields["norm_before_fc"] = True  # Refused below, by name.
        # vLLM takes a folder that does not say for one whose residual is normed.
        fields.setdefault("norm_before_residual", True)
        if config.get("embed_requires_grad") is False:
            fields["own_embeddings"] = False  # What lies in the folder is a copy of the target's.
        # Where no length is proposed, it is the published training depth.
        methods = config["speculators_config"].get("proposal_methods") or [{}]
        return cls(**{**layer, **fields}, num_draft_tokens=methods[0].get("speculative_tokens") or 7)

    def to_speculators(self) -> dict[str, Any]:
        """What the `config.json` of a `speculators` folder says of this drafter."""
        layer = {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_A_LAYER}
        return {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer,
            **{name: getattr(self, name) for name in _SPECULATORS_FIELDS},
            "norm_before_fc": False,
            "embed_requires_grad": bool(self.own_embeddings or self.hidden_size != self.target_hidden_size),
        }

    @classmethod
    def layout(cls, written: dict[str, Any]) -> str:
        published = "LlamaForCausalLMEagle3" in (written.get("architectures") or [])
        return super().layout(written) if published else "flat, as SafeAILab publishes it"

    @classmethod
    def sglang_flags(cls, kind: str, num_draft_tokens: int) -> list[str]:
        return [
            *super().sglang_flags(kind, num_draft_tokens),
            f"--speculative-num-steps {num_draft_tokens}",
            "--speculative-eagle-topk 1",
            f"--speculative-num-draft-tokens {num_draft_tokens + 1}",
        ]

    @staticmethod
    def engine_faults(written: dict[str, Any], names: set[str]) -> list[tuple[str, set[str]]]:
        faults = layer_faults(written)
        if "speculators_model_type" in written:
            if "embed_tokens.weight" not in names:
                told = "there is no embed_tokens.weight, in place of which the speculators library computes noise"
                faults.append((told, set()))
            return faults
        if written.get("architectures") == ["LlamaForCausalLM"]:
            faults.append(("architectures says LlamaForCausalLM, which SGLang loads as a target", {"SGLang"}))
        if "draft_vocab_size" not in written:
            faults.append(("there is no draft_vocab_size, without which SGLang stops", {"SGLang"}))
        elif written["draft_vocab_size"] == written["vocab_size"] and {"d2t", "t2d"} & names:
            faults.append(("the tables d2t and t2d of a whole vocabulary are there, which vLLM refuses", {"vLLM"}))
        for name in ("norm_before_residual", "attention_bias", "mlp_bias"):
            if written.get(name):
                faults.append((f"{name} is set, which SGLang does not compute", {"SGLang"}))
        nested = (written.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        taps = {
            "vLLM": written.get("eagle_aux_hidden_state_layer_ids"),
            "SGLang": nested and [index + 1 for index in nested],
        }
        named = taps["vLLM"] or taps["SGLang"]
        if named and named != [2, (named[-1] + 3) // 2, named[-1]]:
            faults += [
                (f"the taps {named} of hidden_states are not written where {engine} reads them", {engine})
                for engine in taps
                if not taps[engine]
            ]
        if "embed_tokens.weight" in names and written.get("target_hidden_size") in (None, written["hidden_size"]):
            faults.append(("there are embeddings, in place of which SGLang takes the target's", set()))
        return faults

    @classmethod
    def from_target(
        cls,
        target_config: PreTrainedConfig,
        num_draft_tokens: int = 7,
        target_layer_ids: list[int] | None = None,
        draft_token_ids: list[int] | None = None,
        **overrides: Any,
    ) -> Eagle3Config:
        """
        A drafter config shaped after its target (Qwen3-, Llama- or Gemma3-like).

        Args:
            target_config ([`~transformers.PreTrainedConfig`]): The target's (text) config.
            num_draft_tokens (`int`, *optional*, defaults to `7`): K.
            target_layer_ids (`list[int]`, *optional*): Three taps, as outputs of layers counted from 0.
            draft_token_ids (`list[int]`, *optional*): See [`draft_vocabulary`]; the whole vocabulary by default.
            overrides: Further config fields.

        Raises:
            `TypeError`: There is no such field.
            `ValueError`: The size of a draft vocabulary without its tokens.
        """
        cls.check_options(overrides)
        check_tokens_are_named(draft_token_ids, overrides.get("draft_vocab_size"), target_config.vocab_size)
        taps = target_layer_ids or default_layer_ids(target_config.num_hidden_layers)
        shape = {
            **shape_of(target_config),
            "target_hidden_size": target_config.hidden_size,
            "eagle_aux_hidden_state_layer_ids": [index + 1 for index in taps],
            **{name: getattr(target_config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
        return cls(num_draft_tokens=num_draft_tokens, draft_token_ids=draft_token_ids, **{**shape, **overrides})


def default_layer_ids(num_target_layers: int) -> list[int]:
    """
    The published taps, `hidden_states[2, n // 2, n − 3]`, as outputs of layers counted from 0.

    Below 7 layers these do not ascend, and engines collect taps in the layers' order; then the first layer, the last
    that can be tapped, and one between them.
    """
    if num_target_layers < 7:
        return [0, (num_target_layers - 2) // 2, num_target_layers - 2]
    return [1, num_target_layers // 2 - 1, num_target_layers - 4]


def _check_features(fields: dict[str, Any], eagle_config: dict[str, Any]) -> None:
    known = {*LlamaConfig().to_dict(), *GenerationConfig().to_dict(), *_IDLE_FIELDS, *_ONLY_VALUES}
    asked = {name: value for name, value in fields.items() if value and name not in known and name[0] != "_"}
    asked |= {
        name: fields[name]
        for name, only in _ONLY_VALUES.items()
        if fields.get(name) not in (None, only)
    }  # fmt: skip
    if fields.get("sliding_window") and fields.get("use_sliding_window") is not False:
        asked["sliding_window"] = fields["sliding_window"]
    asked |= uncomputed_rope(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    idle = ("eagle_aux_hidden_state_layer_ids", "use_aux_hidden_state")
    asked |= {f"eagle_config.{name}": value for name, value in eagle_config.items() if value and name not in idle}
    if eagle_config.get("use_aux_hidden_state") is False:
        asked["eagle_config.use_aux_hidden_state"] = False
    if asked:
        raise InputError(
            f"This EAGLE-3 config asks for what is not computed here: {asked}. Take a drafter without it; if a field "
            "changes nothing in this one, remove it from config.json."
        )
