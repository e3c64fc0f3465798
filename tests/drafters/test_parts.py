"""Pieces that drafters share, by hand."""

import pytest
import torch
from conftest import tiny_model
from torch import nn

from draft_opd_trl.core.errors import InputError
from draft_opd_trl.core.records import DraftBlocks
from draft_opd_trl.drafters import parts


# -- configs -------------------------------------------------------------------------------------------------------


def test_the_shape_is_the_targets_with_plain_rotation():
    """Gemma has one RoPE for each sort of layer; the draft layer attends to everything."""
    shape = parts.shape_of(tiny_model("gemma3").config)
    assert (shape["hidden_size"], shape["num_key_value_heads"], shape["head_dim"]) == (32, 2, 8)
    assert shape["rope_parameters"] == {"rope_type": "default", "rope_theta": 1_000_000.0}
    config = tiny_model("llama").config
    config.head_dim = None
    assert parts.shape_of(config)["head_dim"] == 32 // 4


def test_rotation_as_engines_read_it():
    assert parts.with_rope_fields({"x": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}) == {
        "x": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "rope_theta": 5.0,
    }
    scaled = parts.with_rope_fields({"rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}})
    assert scaled["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    for name in ("dynamic", "longrope", "mrope"):
        assert parts.uncomputed_rope({"type": name}) == {"rope_scaling": {"type": name}}
    assert parts.uncomputed_rope({"rope_type": "yarn"}) == {}
    assert parts.uncomputed_rope({"rope_type": "default", "mrope_section": [1]})


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"rope_theta": 1.0}, []),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 1.0}}, []),
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, ["1.0 at the top level and 2.0"]),
        ({"rope_theta": 1.0, "hidden_act": "gelu"}, ["engines compute silu alone"]),
        ({}, ["no rope_theta is written"]),
        ({"speculators_model_type": "x", "transformer_layer_config": {"rope_theta": 1.0}}, []),
        ({"speculators_model_type": "x", "rope_theta": 1.0}, ["no rope_theta is written"]),
    ],
)
def test_layers_that_engines_read_otherwise(written, words):
    told = [fault for fault, engines in parts.layer_faults(written)]
    assert len(told) == len(words) and all(word in fault for word, fault in zip(words, told, strict=True))


def test_a_speculators_config_names_all_that_it_lacks():
    whole = {"transformer_layer_config": {"hidden_size": 8, "architectures": ["X"]}, "a": 0}
    assert parts.speculators_layer(whole, "a") == {"hidden_size": 8}
    with pytest.raises(InputError, match=r"lacks \['transformer_layer_config', 'b'\], so no engine"):
        parts.speculators_layer({"a": 1}, "a", "b")


# -- drafting ------------------------------------------------------------------------------------------------------


def test_a_quarter_turn():
    turned = parts.rotate(
        torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4), torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    )
    assert turned.flatten().tolist() == [-3, -4, 1, 2]


def test_blocks_are_laid_out_a_row_a_text():
    tokens = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    proposals = torch.tensor([[1, 2], [3, 4], [5, 6]])
    texts, anchors = torch.tensor([1, 0, 1]), torch.tensor([3, 0, 1])
    grid = parts.lay_out(DraftBlocks(texts, anchors, proposals, torch.zeros(3), torch.zeros(3)), tokens)
    # Cells without a block stand at position 1.
    assert grid.anchors.tolist() == [[0, 1], [3, 1], [1, 1]]
    assert grid.tokens.tolist() == [[10, 11], [23, 21], [31, 31]]
    assert grid.drafted[grid.cells].tolist() == proposals.tolist() and grid.anchors[grid.cells].tolist() == [3, 0, 1]
    none = parts.lay_out(DraftBlocks.empty(2), tokens)
    assert none.anchors.shape == (3, 1) and none.drafted.shape == (3, 1, 2)


@pytest.mark.parametrize("recompute", [False, True])
def test_parts_are_drafted_in_turn_and_again_for_gradients(recompute):
    weight, drafted = torch.ones(1, requires_grad=True), []

    def draft(part):
        drafted.append((part.start, part.stop))
        return (weight * torch.arange(5.0)[part])[None, :, None, None]

    states = parts.draft_in_parts(draft, 5, 2, recompute)
    assert states.flatten().tolist() == [0, 1, 2, 3, 4] and drafted == [(0, 2), (2, 4), (4, 6)]
    states.sum().backward()
    assert weight.grad.item() == 10 and len(drafted) == (6 if recompute else 3)
    with torch.no_grad():
        parts.draft_in_parts(draft, 5, 2, recompute)
    assert len(drafted) == (9 if recompute else 6)


# -- weights of a target -------------------------------------------------------------------------------------------


def test_only_a_plain_map_is_its_weight():
    assert parts.plain_weight(linear := nn.Linear(3, 2, bias=False)) is linear.weight
    assert parts.plain_weight(nn.Linear(3, 2)) is None

    class Adapted(nn.Linear):
        pass

    assert parts.plain_weight(Adapted(3, 2, bias=False)) is None


def test_a_weight_is_read_through_what_stores_it():
    class Coded(nn.Module):
        """Whole numbers and a scale, as quantised layers keep them."""

        in_features = 3

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([[1, 2, 3], [4, 5, 6]]), requires_grad=False)

        def forward(self, x):
            return x @ (0.5 * self.weight.float()).T + 7.0

    assert parts.dense_weight(Coded()).tolist() == [[0.5, 1, 1.5], [2, 2.5, 3]]
    assert parts.dense_weight(linear := nn.Linear(3, 2)) is linear.weight


@torch.no_grad()
def test_what_fits_is_copied_and_the_rest_left():
    mine = torch.zeros(2)
    parts.copy_fitting(mine, torch.ones(3))
    assert mine.tolist() == [0, 0]
    parts.copy_fitting(mine, torch.ones(2))
    assert mine.tolist() == [1, 1]
    # Gemma's norm multiplies by 1 + w.
    theirs = tiny_model("gemma3").model.norm
    theirs.weight.fill_(0.25)
    norm = nn.RMSNorm(32, eps=1e-6)
    parts.copy_norm(norm, theirs)
    torch.testing.assert_close(norm.weight, torch.full((32,), 1.25))
    narrow = nn.RMSNorm(16)
    parts.copy_norm(narrow, theirs)
    assert bool((narrow.weight == 1).all())
