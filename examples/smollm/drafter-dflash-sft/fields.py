"""What the fields of a drafter's config may hold: types and ranges, by name, wherever such a field stands.

Sizes are bounded by what no drafter comes near, so that a damaged or hostile `config.json` is refused by name before
anything is built from it. Knows no drafter kinds.
"""

from __future__ import annotations

import math
from typing import Any

from transformers.activations import ACT2FN

from .errors import InputError


# Largest whole number of each, from 1.
_SIZES = {
    "block_size": 1024,
    "num_draft_tokens": 1023,
    "speculative_tokens": 1023,
    "hidden_size": 2**16,
    "target_hidden_size": 2**16,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "num_hidden_layers": 256,
    "num_target_layers": 2**12,
    "vocab_size": 2**22,
    "draft_vocab_size": 2**22,
    "markov_rank": 2**16,
    "num_anchors": 2**22,
    "max_position_embeddings": 2**31,
}
_FLAGS = set(
    "attention_bias confidence_head_with_markov embed_requires_grad enable_confidence_head fc_norm is_causal mlp_bias "
    "norm_before_fc norm_before_residual norm_output own_embeddings sample_from_anchor tie_word_embeddings "
    "use_aux_hidden_state use_sliding_window".split()
)
# From and up to, neither included.
_NUMBERS = {"rms_norm_eps": (0, 1), "rope_theta": (0, math.inf), "factor": (0, math.inf)}
_TAPS = {"aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", "target_layer_ids"}
_NAMES = {
    "hidden_act",
    "markov_head_type",
    "model_type",
    "name_or_path",
    "rope_type",
    "speculators_model_type",
    "type",
}
_LISTS_OF_NAMES = {"architectures", "layer_types"}
_OBJECTS = {"auto_map", "dflash_config", "eagle_config", "rope_parameters", "rope_scaling", "speculators_config"}
_OBJECTS |= {"transformer_layer_config", "verifier"}


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _wanted(name: str, value: Any) -> str | None:
    """What the field must be, where it is not; any field may be unset."""
    if value is None:
        return None
    if name in _SIZES:
        return None if _is_whole(value, 1, _SIZES[name]) else f"a whole number from 1 to {_SIZES[name]}"
    if name == "mask_token_id":
        return None if _is_whole(value, 0, _SIZES["vocab_size"]) else "a token id"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if name in _NUMBERS:
        low, high = _NUMBERS[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if number and low < value < high else f"a number above {low} and below {high}"
    if name in _TAPS:
        whole = isinstance(value, (list, tuple)) and len(value) <= 2**12
        return None if whole and all(_is_whole(one, -1, 2**12) for one in value) else "a list of layer numbers"
    if name in _NAMES:
        return None if isinstance(value, str) else "a string"
    if name in _LISTS_OF_NAMES:
        whole = isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)
        return None if whole else "a list of strings"
    if name == "proposal_methods":
        whole = isinstance(value, (list, tuple)) and all(isinstance(one, dict) for one in value)
        return None if whole else "a list of objects"
    return "an object" if name in _OBJECTS and not isinstance(value, dict) else None


def check_fields(fields: dict[str, Any], where: str = "") -> None:
    """
    Types and ranges of what is known by name, in `fields` and in the objects within.

    Args:
        fields (`dict`): Of a config.
        where (`str`, *optional*): Name of the object that holds them, for the message.

    Raises:
        `ValueError`: A field cannot be what it is, by name.
    """
    for name, value in fields.items():
        if wanted := _wanted(name, value):
            shown = repr(value) if not isinstance(value, int) or abs(value) < 10**18 else "a huge number"
            raise InputError(f"{where}{name} is {shown[:80]}, but must be {wanted}. Correct it in the config.")
        inner = [value] if name in _OBJECTS else value if name == "proposal_methods" else []
        for one in inner or []:
            check_fields(one or {}, f"{where}{name}.")
    if fields.get("hidden_act") and fields["hidden_act"] not in ACT2FN:
        raise InputError(f"hidden_act is {fields['hidden_act'][:80]!r}, which transformers does not know. Correct it.")


def check_heads(config: Any) -> None:
    """
    Raises:
        `ValueError`: Attention cannot be shaped so: heads that share no keys evenly, or that cannot be rotated.
    """
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads or (head_dim or 2) % 2:
        raise InputError(
            f"num_attention_heads {heads}, num_key_value_heads {kv_heads} and head_dim {head_dim} make no "
            "attention: key heads must divide the heads, and head_dim be even. Correct them in the config."
        )
