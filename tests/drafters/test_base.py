"""What every drafter of the registry must keep: its paths agree, it learns, it starts from its target."""

import pytest
import torch
from conftest import ANY_KIND, VOCAB, counting_target, tiny_drafter, tiny_options
from invariants import (
    assert_a_grid_proposes_what_single_anchors_do,
    assert_checkpointing_keeps_less_and_changes_no_gradient,
    assert_draft_is_propose,
    assert_every_parameter_gets_a_gradient,
    propose_one,
    sample_texts,
    started_and_untouched,
)

from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.drafters import DRAFTERS, Drafter, create_drafter


def test_registry_names_each_class_by_its_kind():
    for name, drafter_class in DRAFTERS.items():
        assert drafter_class.kind == name


def test_unknown_kind():
    with pytest.raises(ValueError, match=f"Unknown drafter kind 'medusa'; known kinds are .*{ANY_KIND}"):
        create_drafter("medusa", counting_target())


def test_drafting_with_gradients_equals_cached_proposing_at_every_anchor(target, drafter):
    assert_draft_is_propose(target, drafter)


def test_grid_proposals_equal_single_ones(target, drafter):
    assert_a_grid_proposes_what_single_anchors_do(target, drafter)


def test_sampled_proposals_come_with_their_distributions(qwen_target, qwen_drafter):
    rollout = sample_texts()
    features, _ = qwen_target.forward_text(rollout.tokens, qwen_drafter.target_layer_ids)
    choose = Chooser(SamplingParams(1.0))
    with torch.no_grad():
        proposal = propose_one(qwen_drafter, features, rollout, 0, 2, choose)
    assert proposal.probs.shape == (1, 1, qwen_drafter.num_draft_tokens, VOCAB)
    torch.testing.assert_close(proposal.probs.sum(-1), torch.ones(1, 1, qwen_drafter.num_draft_tokens))
    assert (proposal.probs.gather(-1, proposal.tokens[..., None]) > 0).all()


def test_every_parameter_gets_a_gradient(target, kind):
    assert_every_parameter_gets_a_gradient(target, tiny_drafter(kind, target))


def test_activation_checkpointing_keeps_no_activations_and_changes_no_gradient(qwen_target, kind):
    assert_checkpointing_keeps_less_and_changes_no_gradient(qwen_target, lambda: tiny_drafter(kind, qwen_target))


def test_the_targets_weights_are_not_the_drafters(target, drafter):
    theirs = {parameter.data_ptr() for parameter in target.model.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in drafter.parameters()}
    assert not theirs & {value.data_ptr() for value in drafter.state_dict().values()}


def test_unbound_drafter_says_so(kind, qwen_target):
    drafter = tiny_drafter(kind, qwen_target)
    unbound = type(drafter)(drafter.config)
    with pytest.raises(RuntimeError, match=r"call `drafter.bind\(target\)` first"):
        _ = unbound.target


def test_what_starts_from_the_target_is_what_its_kind_says(target, kind):
    started, untouched = started_and_untouched(kind, target)
    pairs = zip(started.parameters(), untouched.parameters(), strict=True)
    same = all(torch.equal(mine, other) for mine, other in pairs)
    assert same == (DRAFTERS[kind].init_from_target is Drafter.init_from_target)


def test_options_that_nothing_is_like(qwen_target, kind):
    with pytest.raises(TypeError, match="has no option 'xyzzy'. It takes .*, and fields of the config"):
        create_drafter(kind, qwen_target, **tiny_options(kind, qwen_target), xyzzy=2)
    # Fields of the config are options.
    create_drafter(kind, qwen_target, **tiny_options(kind, qwen_target), initializer_range=0.5)
