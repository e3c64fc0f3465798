"""A Qwen3.5-shaped hybrid out of the pocket target: three of its four attention layers become Gated DeltaNet."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig


# What both configs call alike.
SHAPE = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps max_position_embeddings tie_word_embeddings bos_token_id eos_token_id pad_token_id
""".split()


def hybrid_of(target: PreTrainedModel) -> Qwen3_5ForCausalLM:
    """The same embedding, norms and MLPs; the last attention exactly, the others as where linear attention starts."""
    shape = target.config
    config = Qwen3_5TextConfig(
        **{name: getattr(shape, name) for name in SHAPE},
        rope_parameters={**shape.rope_parameters, "partial_rotary_factor": 1.0},
        linear_num_key_heads=shape.num_attention_heads,
        linear_num_value_heads=shape.num_attention_heads,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
    )
    model, theirs = Qwen3_5ForCausalLM(config), target.state_dict()
    # Norms multiply by 1 + weight here.
    shared = {name: theirs[name] - int("norm" in name) for name in model.state_dict() if "_attn" not in name}
    model.load_state_dict(shared, strict=False)
    model.generation_config = target.generation_config
    for mine, theirs in zip(model.model.layers, target.model.layers, strict=True):
        if hasattr(mine, "self_attn"):
            copy_attention(mine.self_attn, theirs.self_attn)
        else:
            copy_linear_attention(mine.linear_attn, theirs.self_attn)
    return model


@torch.no_grad()
def copy_attention(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Exactly: the gate stands at one half, and the output makes up for it."""
    queries = theirs.q_proj.weight.unflatten(0, (-1, theirs.head_dim))
    mine.q_proj.weight.copy_(torch.cat([queries, torch.zeros_like(queries)], dim=1).flatten(0, 1))
    mine.k_proj.weight.copy_(theirs.k_proj.weight)
    mine.v_proj.weight.copy_(theirs.v_proj.weight)
    mine.o_proj.weight.copy_(2 * theirs.o_proj.weight)
    mine.q_norm.weight.copy_(theirs.q_norm.weight - 1)
    mine.k_norm.weight.copy_(theirs.k_norm.weight - 1)


@torch.no_grad()
def copy_linear_attention(mine: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Queries, keys and values, each head's own; what attention does not have keeps its random start."""
    repeats = theirs.num_key_value_groups
    keys, values = (
        part.weight.unflatten(0, (-1, theirs.head_dim)).repeat_interleave(repeats, dim=0).flatten(0, 1)
        for part in (theirs.k_proj, theirs.v_proj)
    )
    mine.in_proj_qkv.weight.copy_(torch.cat([theirs.q_proj.weight, keys, values]))
    mine.out_proj.weight.copy_(theirs.o_proj.weight)
