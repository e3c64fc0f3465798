"""Pieces that drafters share: shape and start from a target, rotation, drafting part by part, and what of RoPE and
`speculators` configs is read.

Knows no drafter kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import rotate_half

from .errors import InputError
from .packing import pack_by_text




# `model_type` of the text configs of targets that were looked up in both engines: of others nothing is known.
KNOWN_TARGETS = frozenset(
    "apertus cohere2 deepseek_v3 gemma gemma2 gemma3_text glm4 glm4_moe gpt_oss granite llama ministral3 mistral "
    "mixtral phi3 qwen2 qwen2_moe qwen3 qwen3_moe".split()
)
# Types of targets whose class in SGLang has `set_dflash_layers_to_capture`, through which drafters of blocks get their
# hidden states. One without it refuses to start.
BLOCKS_IN_SGLANG = frozenset("deepseek_v3 gpt_oss llama ministral3 mistral phi3 qwen3 qwen3_moe".split())
# Types of targets whose class in vLLM has the interface `SupportsEagle3`, through which every kind gets its hidden
# states there. One without it refuses to start.
TAPPED_BY_VLLM = frozenset(
    "apertus deepseek_v3 gpt_oss granite llama ministral3 mistral phi3 qwen2 qwen3 qwen3_moe".split()
)


# What families call the smallest number under a norm's root.
NORM_EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def in_dtype_of(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`states` in the dtype of the `weight` that multiplies them; as they are under autocast, which casts both."""
    return states if torch.is_autocast_enabled(states.device.type) else states.to(weight.dtype)


def shape_of(target_config: PreTrainedConfig) -> dict[str, Any]:
    """Config fields of a draft layer as wide as the (text) target's; what its config lacks is as is usual."""

    def of(*names: str, usual: Any) -> Any:
        for name in names:
            try:
                value = getattr(target_config, name, None)
            except Exception:  # of a config whose layers differ in it
                continue
            if value is not None:
                return value[-1] if isinstance(value, (list, tuple)) else value
        return usual

    rope = getattr(target_config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    width = target_config.hidden_size
    heads = of("num_attention_heads", usual=max(width // 64, 1))
    return {
        "vocab_size": target_config.vocab_size,
        "hidden_size": width,
        "intermediate_size": of("intermediate_size", "ffn_dim", usual=4 * width),
        "num_attention_heads": heads,
        "num_key_value_heads": of("num_key_value_heads", usual=heads),
        "head_dim": of("head_dim", usual=width // heads),
        "rms_norm_eps": of(*NORM_EPSILONS, usual=1e-6),
        "max_position_embeddings": of("max_position_embeddings", usual=32_768),
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 10_000.0},
    }


def with_rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the top-level fields that engines read; transformers 5 writes `rope_parameters` only."""
    rope = dict(config.get("rope_parameters") or {})
    fields = {"rope_theta": rope.pop("rope_theta", None)}
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    return {**config, **fields}


def uncomputed_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """The part of RoPE's parameters that no drafter here computes, by name; empty if there is none."""
    kind = rope.get("rope_type", rope.get("type"))
    return {"rope_scaling": rope} if kind in ("dynamic", "longrope", "mrope") or rope.get("mrope_section") else {}


def uncomputed_block(config: Any) -> dict[str, Any]:
    """What of a config the block backbone does not compute, by name; empty if there is none."""
    asked = {}
    if set(config.layer_types) != {"full_attention"}:
        asked["layer_types"] = config.layer_types
    if getattr(config, "is_causal", None):
        asked["is_causal"] = True
    return asked | uncomputed_rope(config.rope_parameters)


def default_layer_ids(num_target_layers: int, num_draft_layers: int) -> list[int]:
    """z-lab's taps: the middle layer for one draft layer (never the last), else evenly from 1 to n − 3."""
    if num_draft_layers == 1:
        return [min(num_target_layers // 2, num_target_layers - 2)]
    span = (num_target_layers - 4) / (num_draft_layers - 1)
    return [int(round(1 + index * span)) for index in range(num_draft_layers)]


def layer_faults(written: dict[str, Any]) -> list[tuple[str, set[str]]]:
    """Where engines read a draft layer's fields otherwise, in a flat `config.json` or one of `speculators`."""
    fields = written.get("transformer_layer_config") or {} if "speculators_model_type" in written else written
    faults, both = [], {"SGLang", "vLLM"}
    if (fields.get("hidden_act") or "silu") != "silu":
        faults.append((f"hidden_act is {fields['hidden_act']!r}, and engines compute silu alone", both))
    top, inner = fields.get("rope_theta"), (fields.get("rope_parameters") or {}).get("rope_theta")
    if top is None and inner is None:
        faults.append(("no rope_theta is written, and each loader has a default of its own", both))
    elif None not in (top, inner) and top != inner:
        faults.append((f"rope_theta is {top} at the top level and {inner} in rope_parameters", both))
    return faults


def speculators_layer(config: dict[str, Any], *needed: str) -> dict[str, Any]:
    """
    The flat fields in the `config.json` of a `speculators` folder.

    Raises:
        `ValueError`: It lacks them, or one of the fields `needed` beside them.
    """
    missing = [name for name in ("transformer_layer_config", *needed) if config.get(name) is None]
    if missing:
        raise InputError(f"This speculators config.json lacks {missing}, so no engine could load it. Export it again.")
    return {name: value for name, value in config["transformer_layer_config"].items() if name != "architectures"}


def speculators_block(config: Any, *own: str) -> dict[str, Any]:
    """What `speculators` says of a drafter of blocks, whose fields `own` do not stand in its layer's config."""
    layer = config.to_dict()
    for name in ("_name_or_path", "architectures", "auto_map", "block_size", *own):
        layer.pop(name, None)
    return {
        "transformer_layer_config": layer,
        "draft_vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [index + 1 for index in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": True,
    }


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on `(B, Q, heads, head_dim)` with tables `(B, Q, head_dim)`."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    return states * cos + rotate_half(states) * sin


@dataclass
class BlockGrid:
    """
    Packed blocks as a grid, a line a text. Cells without a block draft at position 1.

    Args:
        anchors, tokens (`torch.LongTensor` of shape `(B, M)`): Anchors and the text's tokens there.
        drafted (`torch.LongTensor` of shape `(B, M, K)`): Proposals.
        cells (`tuple`): Index of the packed blocks, `(N,)` twice.
    """

    anchors: torch.Tensor
    tokens: torch.Tensor
    drafted: torch.Tensor
    cells: tuple[torch.Tensor, torch.Tensor]


def lay_out(blocks: DraftBlocks, tokens: torch.Tensor) -> BlockGrid:
    """Blocks over texts `(B, T)` as a grid, at least one column wide."""
    batch, length = tokens.shape
    columns, width = pack_by_text(blocks.texts, batch)
    cells = blocks.texts, columns
    anchors = tokens.new_ones((batch, max(width, 1)))
    anchors[cells] = blocks.anchors
    drafted = tokens.new_zeros((*anchors.shape, blocks.num_draft_tokens))
    drafted[cells] = blocks.draft_tokens
    return BlockGrid(anchors, tokens.gather(1, anchors.clamp(max=length - 1)), drafted, cells)


def draft_in_parts(draft: Callable[[slice], torch.Tensor], width: int, size: int, recompute: bool) -> torch.Tensor:
    """States `(B, width, K, H)` of anchors drafted `size` at a time; recomputed parts keep no activations."""
    parts = [slice(start, start + size) for start in range(0, width, size)]
    if recompute and torch.is_grad_enabled():
        return torch.cat([checkpoint(draft, part, use_reentrant=False) for part in parts], dim=1)
    return torch.cat([draft(part) for part in parts], dim=1)


def init_layer(layer: nn.Module, source: nn.Module) -> None:
    """
    Start a draft layer from a target's where names and shapes fit; what does not stays as it is.

    A matrix that reads more than the target's takes the target's in its last columns. Queries and keys that the target
    norms and the draft layer does not are left out: without their norm they say something else.
    """
    mine, theirs = dict(layer.named_modules()), dict(source.named_modules())
    # Where norms stand on both sides of a sub-layer (Gemma), the one before the MLP has a name of its own.
    if "pre_feedforward_layernorm" in theirs:
        theirs["post_attention_layernorm"] = theirs["pre_feedforward_layernorm"]
    for name, module in mine.items():
        norm = name.replace("_proj", "_norm")
        if name not in theirs or (norm in theirs and norm not in mine):
            continue
        if isinstance(module, nn.Linear) and isinstance(theirs[name], nn.Linear):
            weight = dense_weight(theirs[name])
            copy_fitting(module.weight[:, -weight.shape[1] :], weight)
        elif "norm" in name:
            copy_norm(module, theirs[name])


def plain_weight(linear: nn.Module) -> torch.Tensor | None:
    """A linear map's weight, if the map is a product with it and nothing more: no bias, and no adapter on it."""
    return linear.weight if type(linear) is nn.Linear and linear.bias is None else None


def dense_weight(linear: nn.Module) -> torch.Tensor:
    """A linear map's weight `(out, in)`, whatever it is stored as: what it makes of unit vectors."""
    if linear.weight.is_floating_point():
        return linear.weight
    units = torch.eye(linear.in_features, device=linear.weight.device)
    return (linear(units) - linear(torch.zeros_like(units[:1]))).T


def copy_fitting(parameter: torch.Tensor, source: torch.Tensor) -> None:
    if source.shape == parameter.shape:
        parameter.copy_(source)


def copy_norm(norm: nn.Module, source: nn.Module | None) -> None:
    """
    What the other RMS norm multiplies by, whichever way it stores it: Gemma keeps w of 1 + w. A norm that takes the
    mean away says something else, and is left out.
    """
    weight = getattr(source, "weight", None)
    if weight is None or weight.shape != norm.weight.shape:
        return
    scale = source(torch.ones_like(weight))
    if scale.any():
        norm.weight.copy_(scale)


def layers_to_start_from(decoder: nn.Module, count: int) -> list[nn.Module]:
    """The last layers of a target that have an attention such as a draft layer's; fewer where there are no more."""
    layers = list(getattr(decoder, "layers", ()))
    attending = [layer for layer in layers if hasattr(layer, "self_attn")]
    return (attending or layers)[-count:]
