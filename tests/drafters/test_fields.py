"""What fields of a config may hold, by name, wherever they stand."""

from types import SimpleNamespace

import pytest

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.drafters.fields import check_fields, check_heads


def test_fields_that_are_right():
    check_fields(
        {
            "hidden_size": 2**16,
            "vocab_size": None,
            "mask_token_id": 0,
            "rms_norm_eps": 1e-6,
            "target_layer_ids": [-1, 5],
            "hidden_act": "silu",
            "layer_types": ["full_attention"],
            "rope_parameters": {"rope_theta": 10_000, "factor": 8.0},
            "proposal_methods": [{"speculative_tokens": 5}],
            "of_somebody_else": object(),
        }
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, but must be a whole number from 1 to 65536"),
        ({"hidden_size": True}, "hidden_size is True, but"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0, but"),
        ({"vocab_size": 10**30}, "vocab_size is a huge number, but"),
        ({"mask_token_id": -1}, "mask_token_id is -1, but must be a token id"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0, but must be true or false"),
        ({"rms_norm_eps": 1}, "rms_norm_eps is 1, but must be a number above 0 and below 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, but must be a number above 0"),
        ({"target_layer_ids": [1, "2"]}, "must be a list of layer numbers"),
        ({"target_layer_ids": [1] * 5000}, "must be a list of layer numbers"),
        ({"model_type": 3}, "model_type is 3, but must be a string"),
        ({"architectures": "Mine"}, "must be a list of strings"),
        ({"rope_parameters": []}, r"rope_parameters is \[\], but must be an object"),
        ({"rope_scaling": {"factor": 0}}, "rope_scaling.factor is 0, but"),
        ({"speculators_config": {"verifier": {"architectures": [1]}}}, "speculators_config.verifier.architectures is"),
        ({"proposal_methods": [{}, {"speculative_tokens": 0}]}, "proposal_methods.speculative_tokens is 0"),
        ({"proposal_methods": {}}, "must be a list of objects"),
        ({"hidden_act": "gelu" * 50}, "which transformers does not know. Correct it"),
    ],
)
def test_fields_that_cannot_be(fields, words):
    with pytest.raises(InputError, match=words) as raised:
        check_fields(fields)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "right"),
    [(4, 2, 8, True), (4, None, 8, True), (4, 4, None, True), (4, 3, 8, False), (4, 8, 8, False), (4, 2, 7, False)],
)
def test_attention_that_has_no_shape(heads, kv_heads, width, right):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width)
    if right:
        return check_heads(config)
    with pytest.raises(InputError, match=f"num_attention_heads {heads}, num_key_value_heads .* make no attention"):
        check_heads(config)
