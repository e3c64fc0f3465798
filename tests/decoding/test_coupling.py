"""Proposals drawn along a given text, by hand: bound to it while they are accepted, and free afterwards."""

import pytest
import torch
from conftest import counting_target

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.coupling import Coupling, TextChooser


VOCAB = 12


def point(token):
    """Logits of a drafter that says nothing else."""
    return torch.full((VOCAB,), -torch.inf).index_fill(0, torch.tensor(token), 0.0)


def either(first, second):
    return torch.maximum(point(first), point(second))


@pytest.fixture
def rollout():
    return Rollout.from_ids([[1], [7]], [[2, 3, 4, 5], [8, 9]], pad_token_id=0)


@pytest.fixture
def coupling(rollout):
    """Uniforms at which a proposal is accepted where both models have half the mass there, and the second of two is
    drawn where it is free."""
    target = counting_target(VOCAB)
    _, states = target.forward_text(rollout.tokens, [0])
    uniforms = torch.tensor([0.45, 0.9]).expand(2, 5, 3, 2)
    return Coupling(target, states, SamplingParams(1.0), uniforms)


def chosen(coupling, rollout, anchors, logits, vocab_map=None):
    """Proposals of blocks at `anchors` `(B, M)` from logits `(K, V)` that are the same for each."""
    anchors = torch.tensor(anchors)
    choose = TextChooser(coupling, rollout, anchors, vocab_map)
    tokens, probs = choose(torch.stack(logits).expand(*anchors.shape, -1, -1))
    assert probs is None
    return tokens.tolist()


def test_what_the_text_says_is_proposed_while_it_is_accepted(coupling, rollout):
    logits = [either(2, 6), either(3, 6), either(4, 6)]
    assert chosen(coupling, rollout, [[0], [0]], logits) == [[[2, 3, 4]], [[6, 6, 6]]]


def test_after_a_rejection_proposals_are_free(coupling, rollout):
    """The third slot would be 4, as the text has it, were the second right."""
    assert chosen(coupling, rollout, [[0], [0]], [point(2), point(7), either(4, 6)])[0] == [[2, 7, 6]]


def test_after_the_end_of_the_text_proposals_are_free(coupling, rollout):
    logits = [either(5, 6), either(5, 6), either(5, 6)]
    # Both texts end within the block, the shorter before its first slot.
    assert chosen(coupling, rollout, [[3], [2]], logits) == [[[5, 6, 6]], [[6, 6, 6]]]


def test_a_token_that_cannot_be_drafted_was_rejected(coupling, rollout):
    """Proposals are ids of the draft vocabulary; token 3 has none."""
    vocab_map = torch.tensor([2, 4, 6])
    logits = [torch.tensor([0.0, -torch.inf, 0.0]), torch.zeros(3), torch.tensor([-torch.inf, 0.0, 0.0])]
    assert chosen(coupling, rollout, [[0], [0]], logits, vocab_map)[0] == [[0, 2, 2]]


def test_slots_one_by_one_are_the_block_at_once(coupling, rollout):
    """A drafter may draw slot by slot, as each reads the one before."""
    anchors = torch.tensor([[0, 2], [1, 0]])
    logits = torch.randn(2, 2, 3, VOCAB, generator=torch.Generator().manual_seed(0))
    whole, _ = TextChooser(coupling, rollout, anchors, None)(logits)
    choose = TextChooser(coupling, rollout, anchors, None)
    assert torch.equal(torch.stack([choose(logits[:, :, slot])[0] for slot in range(3)], -1), whole)


def test_texts_are_selected_with_their_numbers(coupling, rollout):
    part = coupling.select(torch.tensor([1]))
    assert part.states.shape[0] == part.uniforms.shape[0] == 1
    assert torch.equal(part.states[0], coupling.states[1]) and part.sampling is coupling.sampling
    alone = Rollout(rollout.tokens[1:], rollout.prompt_lengths[1:], rollout.lengths[1:])
    logits = [either(8, 6), either(9, 6), either(4, 6)]
    both = chosen(coupling, rollout, [[0], [0]], logits)
    assert chosen(part, alone, [[0]], logits) == both[1:] == [[[8, 9, 6]]]
