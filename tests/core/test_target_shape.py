"""What a target's config tells: what speculation cannot be exact over, and how far the rest reaches."""

import pytest
import torch
from conftest import random_prompts, tiny_drafter, tiny_model
from transformers import AutoConfig

from draft_opd_trl.core.target import Target
from draft_opd_trl.core.target_shape import TargetShape
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
LONGROPE |= {"original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_rope_that_depends_on_the_batch_is_refused(rope):
    model = tiny_model("llama", rope_parameters={**rope, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=f"RoPE is of type {rope['rope_type']}, whose frequencies.*linear, llama3 or"):
        Target(model)


def test_a_config_of_several_language_models_is_refused():
    with pytest.raises(ValueError, match="type musicgen holds several language models.*Use another target"):
        TargetShape(AutoConfig.for_model("musicgen"))


def test_rope_of_one_layer_type_is_looked_at_too():
    parts = {"sliding_attention": {"rope_type": "default"}, "full_attention": DYNAMIC}
    model = tiny_model("gemma3", rope_parameters={kind: {**part, "rope_theta": 1e4} for kind, part in parts.items()})
    with pytest.raises(ValueError, match="RoPE is of type dynamic"):
        Target(model)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
    ],
    ids=["default", "linear", "yarn", "llama3"],
)
def test_other_rope_is_exact_and_says_how_far_it_reaches(rope, length, kind):
    """Ragged speculation far past the length that was stretched writes the target's own texts."""
    target = Target(tiny_model("llama", rope_parameters={**rope, "rope_theta": 1e4}))
    assert target.context_length == length
    prompts = random_prompts(3, longest=70, seed=4)
    settings = SpeculationSettings(40, [], batch_size=2)
    rollout = speculate(target, tiny_drafter(kind, target), prompts, settings)
    for prompt, text in zip(prompts, rollout.completions(), strict=True):
        ids = torch.tensor([prompt])
        greedy = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        assert text == greedy[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_attn_implementation_internal": "flash_attention_2"}, "'flash_attention_2' does not take the masks"),
        ({"layer_types": ["chunked_attention", "full_attention"] * 2}, "layers of type chunked_attention do not keep"),
        ({}, None),
    ],
    ids=["flash attention", "another sort of layers", "full attention"],
)
def test_a_config_tells_where_no_cache_of_positions_is_exact(change, reason):
    config = tiny_model("qwen3").config
    vars(config).update(change)
    said = TargetShape(config).no_cache_because
    assert (said is None) if reason is None else (reason in said)
