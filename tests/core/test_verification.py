"""The accept/reject rule: hand numbers, then its law by chi-square, which a wrong rule must fail."""

import pytest
import torch
from conftest import chi_square_p

from draft_opd_trl.core.sampling import draw, draw_at
from draft_opd_trl.core.verification import (
    couple_to_text,
    judge_against_text,
    leading_run,
    verify_greedy,
    verify_sampled,
)


SIZE = 8
COUNT = 20_000


def test_leading_run_stops_at_the_first_disagreement():
    agree = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    assert leading_run(agree).tolist() == [2, 0, 4]


def test_greedy_by_hand():
    draft = torch.tensor([[5, 6, 7], [5, 0, 7], [1, 6, 7]])
    target = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    num_accepted, after = verify_greedy(draft, target)
    assert num_accepted.tolist() == [3, 1, 0]
    # All accepted: the bonus. Otherwise the target's own token where the first proposal failed.
    assert after.tolist() == [8, 6, 5]


def test_sampled_certain_cases_by_hand():
    # Row 0: both proposals certain, then bonus 2. Row 1: the first proposal impossible, token 0 certain.
    target_probs = torch.zeros(2, 3, 3)
    target_probs[0, 0, 1] = target_probs[0, 1, 0] = target_probs[0, 2, 2] = 1
    target_probs[1, :, 0] = 1
    num_accepted, after = verify_sampled(torch.tensor([[1, 0], [2, 0]]), None, target_probs)
    assert num_accepted.tolist() == [2, 0]
    assert after.tolist() == [2, 0]


def test_sampled_equals_greedy_on_point_masses():
    draws = torch.Generator().manual_seed(0)
    target_tokens = torch.randint(3, (200, 4), generator=draws)
    draft = torch.randint(3, (200, 3), generator=draws)
    one_hot = torch.nn.functional.one_hot(target_tokens, 3).float()
    expected = verify_greedy(draft, target_tokens)
    assert len(set(expected[0].tolist())) == 4, "the case must hold every length of run"
    for draft_probs in (None, torch.nn.functional.one_hot(draft, 3).float()):
        got = verify_sampled(draft, draft_probs, one_hot, torch.rand((200, 4), generator=draws))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_no_proposal_is_plain_sampling():
    law = torch.tensor([0.7, 0.3])
    num_accepted, after = verify_sampled(
        torch.zeros((COUNT, 0), dtype=torch.long),
        None,
        law.expand(COUNT, 1, -1),
        torch.rand((COUNT, 1), generator=torch.Generator().manual_seed(0)),
    )
    assert num_accepted.tolist() == [0] * COUNT
    assert chi_square_p(torch.bincount(after, minlength=2), law) > 1e-4


def _wrong_rule(draft_tokens, draft_probs, target_probs, uniforms):
    """Draws the recovered token from the target's law, without taking away what the proposal already covered."""
    proposal = draft_tokens[..., None]
    p_target = target_probs[:, :-1].gather(-1, proposal)[..., 0]
    p_draft = torch.ones_like(p_target) if draft_probs is None else draft_probs.gather(-1, proposal)[..., 0]
    num_accepted = leading_run(uniforms[:, :-1] * p_draft < p_target)
    final = target_probs[torch.arange(len(draft_tokens)), num_accepted]
    return num_accepted, draw_at(final, uniforms[:, -1])


def _committed_pair_p(rule, sample_proposals):
    """p-value of the first two committed tokens under a first-order target law on a vocabulary of 8."""
    draws = torch.Generator().manual_seed(1)
    start = torch.softmax(1.5 * torch.randn(SIZE, generator=draws), 0)
    step = torch.softmax(1.5 * torch.randn(SIZE, SIZE, generator=draws), 1)
    draft_law = torch.softmax(1.5 * torch.randn(2, SIZE, generator=draws), 1)
    if sample_proposals:
        draft_probs = draft_law.expand(COUNT, -1, -1)
        draft = draw(draft_probs, draws)
    else:
        draft_probs, draft = None, draft_law.argmax(-1).expand(COUNT, -1)
    target_probs = torch.stack([start.expand(COUNT, -1), step[draft[:, 0]], step[draft[:, 1]]], dim=1)
    num_accepted, after = rule(draft, draft_probs, target_probs, torch.rand((COUNT, 3), generator=draws))
    committed = torch.cat([draft, after[:, None]], dim=1).scatter(1, num_accepted[:, None], after[:, None])
    first = committed[:, 0]
    # Where the block ended with its first token, the next one is drawn plainly, as the next round would.
    plain = draw(step[first], draws)
    second = torch.where(num_accepted == 0, plain, committed[:, 1])
    counts = torch.bincount(first * SIZE + second, minlength=SIZE * SIZE)
    return chi_square_p(counts, start[:, None] * step)


@pytest.mark.parametrize("sample_proposals", [False, True], ids=["argmax", "sampled"])
def test_committed_tokens_follow_the_targets_law(sample_proposals):
    assert _committed_pair_p(verify_sampled, sample_proposals) > 1e-4


@pytest.mark.parametrize("sample_proposals", [False, True], ids=["argmax", "sampled"])
def test_the_chi_square_catches_a_wrong_residual(sample_proposals):
    assert _committed_pair_p(_wrong_rule, sample_proposals) < 1e-6


def test_acceptance_probability_is_the_overlap():
    # Overlap of (0.6, 0.4) and (0.2, 0.8): 0.2 + 0.4.
    draft_law, target_law = torch.tensor([0.6, 0.4]), torch.tensor([0.2, 0.8])
    draws = torch.Generator().manual_seed(2)
    draft_probs = draft_law.expand(COUNT, 1, -1)
    draft, uniforms = draw(draft_probs, draws), torch.rand((COUNT, 2), generator=draws)
    num_accepted, _ = verify_sampled(draft, draft_probs, target_law.expand(COUNT, 2, -1), uniforms)
    assert chi_square_p(torch.bincount(num_accepted, minlength=2), torch.tensor([0.4, 0.6])) > 1e-4


def _coupled_p(rule, size=SIZE):
    """p-value of (proposal, text token) pairs against rejection sampling's own, over a draft vocabulary of `size`."""
    draws = torch.Generator().manual_seed(5)
    target_law = torch.softmax(1.5 * torch.randn(SIZE, generator=draws), 0)
    draft_law = torch.softmax(1.5 * torch.randn(size, generator=draws), 0)
    text = draw(target_law.expand(COUNT, -1), draws)
    draft, accepted = rule(
        draft_law.expand(COUNT, -1),
        target_law[:size].expand(COUNT, -1),
        torch.where(text < size, text, -1),
        torch.rand((COUNT, 2), generator=draws),
    )
    assert torch.equal(accepted, draft == text)
    wide = torch.nn.functional.pad(draft_law, (0, SIZE - size))
    surplus, deficit = (wide - target_law).clamp(min=0), (target_law - wide).clamp(min=0)
    pairs = torch.diag(torch.minimum(wide, target_law)) + surplus[:, None] * deficit / deficit.sum()
    torch.testing.assert_close(pairs.sum(1), wide)
    torch.testing.assert_close(pairs.sum(0), target_law)
    return chi_square_p(torch.bincount(draft * SIZE + text, minlength=SIZE * SIZE), pairs)


def _from_the_whole_law(draft_probs, target_probs, labels, uniforms):
    """Wrong: the rejected token is drawn from all of q but the text's token."""
    drafted, accepted = couple_to_text(draft_probs, target_probs, labels, uniforms)
    index = labels.clamp(min=0)[..., None]
    others = draft_probs.scatter(-1, index, 0.0)
    return torch.where(accepted, drafted, draw_at(others, uniforms[..., 1])), accepted


def _text_blind(draft_probs, target_probs, labels, uniforms):
    """Wrong: drawn from q whatever the text says."""
    drafted = draw_at(draft_probs, uniforms[..., 1])
    return drafted, drafted == labels


@pytest.mark.parametrize("size", [SIZE, SIZE - 3])
def test_coupled_proposals_have_the_joint_law_of_rejection_sampling(size):
    assert _coupled_p(couple_to_text, size) > 1e-4


@pytest.mark.parametrize("rule", [_from_the_whole_law, _text_blind])
def test_the_chi_square_catches_a_wrong_coupling(rule):
    assert _coupled_p(rule) < 1e-6


def test_coupling_to_text_by_hand():
    draft, target = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.25, 0.25, 0.5])
    # Token 2: accepted below 0.2 / 0.5. Surplus of the drafter: (0.25, 0.05, 0), so token 1 from 5/6 on.
    labels = torch.tensor([2, 2, 2, 2, 0])
    uniforms = torch.tensor([[0.39, 0.0], [0.41, 0.0], [0.41, 0.83], [0.41, 0.84], [0.99, 0.5]])
    drafted, accepted = couple_to_text(draft.expand(5, -1), target.expand(5, -1), labels, uniforms)
    assert drafted.tolist() == [2, 0, 0, 1, 0]
    assert accepted.tolist() == [True, False, False, False, True]
    # No text token binds: drawn from the drafter alone.
    free, accepted = couple_to_text(draft, torch.zeros(3), torch.tensor(-1), torch.tensor([0.0, 0.9]))
    assert free == 2 and not accepted


def test_judge_against_text_by_hand():
    draft = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 9, 3], [9, 2, 3]])
    labels = torch.tensor([[1, 2, 3]] * 4)
    # The second text ends after two slots: what stands beyond is not judged.
    assert judge_against_text(draft, labels, torch.tensor([3, 2, 3, 3])).tolist() == [3, 2, 1, 0]


def test_judging_the_text_equals_what_sampling_said():
    """With point-mass proposals the verdict can be read off the committed text, at any temperature."""
    draws = torch.Generator().manual_seed(3)
    draft = torch.randint(SIZE, (2000, 2), generator=draws)
    target_probs = torch.softmax(torch.randn(2000, 3, SIZE, generator=draws), -1)
    num_accepted, after = verify_sampled(draft, None, target_probs, torch.rand((2000, 3), generator=draws))
    text = torch.cat([draft, after[:, None]], dim=1).scatter(1, num_accepted[:, None], after[:, None])
    judged = judge_against_text(draft, text[:, :2], (num_accepted + 1).clamp(max=2))
    assert torch.equal(judged, num_accepted)
    assert len(set(num_accepted.tolist())) == 3
