"""Tiny random multimodal models, as checkpoints that name the whole model's class."""

import torch
from conftest import LINEAR, VOCAB
from transformers import AutoConfig, AutoModelForMultimodalLM


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "patch_size": 4}
_DEEP = {**_TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
_PLAIN = {**_TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
# Of the text model, of the vision tower, of the whole.
MULTIMODAL = {
    "gemma3": (
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8},
        _PLAIN,
        {"mm_tokens_per_image": 4, "image_token_index": 40, "boi_token_index": 41, "eoi_token_index": 42},
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "pixtral", **_PLAIN, "head_dim": 8},
        {},
    ),
    "qwen3_5": ({**LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}, _DEEP, {"image_token_id": 40}),
    "qwen3_vl": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        {**_DEEP, "deepstack_visual_indexes": [0]},
        {"image_token_id": 40},
    ),
    "llama4": (
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6},
        {**_PLAIN, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        {},
    ),
}


def tiny_multimodal(family, seed=0):
    """A seeded random model with a vision tower, whose greedy text is varied."""
    text, tower, whole = MULTIMODAL[family]
    config = AutoConfig.for_model(family, text_config={**TEXT, **text}, vision_config=tower, **whole)
    torch.manual_seed(seed)
    return AutoModelForMultimodalLM.from_config(config).float().eval()
