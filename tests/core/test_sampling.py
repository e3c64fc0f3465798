"""Logits to probabilities to tokens: hand-made distributions first, then the law of the draws."""

import pytest
import torch
from conftest import chi_square_p

from draft_opd_trl.core.sampling import Chooser, draw, draw_at, probabilities
from draft_opd_trl.core.sampling_params import SamplingParams


# exp of these logits is 8, 4, 2, 2: probabilities 1/2, 1/4, 1/8, 1/8.
LOGITS = torch.tensor([[2.0, 8.0, 4.0, 2.0]]).log()


def test_temperature_zero_is_a_point_mass():
    assert probabilities(LOGITS, SamplingParams()).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_temperature_one_is_the_softmax():
    torch.testing.assert_close(probabilities(LOGITS, SamplingParams(1.0)), torch.tensor([[0.125, 0.5, 0.25, 0.125]]))


def test_temperature_divides_the_logits():
    # At temperature 1/2 weights are squared: 4, 64, 16, 4 of 88.
    torch.testing.assert_close(probabilities(LOGITS, SamplingParams(0.5)), torch.tensor([[4.0, 64.0, 16.0, 4.0]]) / 88)


def test_top_k_keeps_the_most_likely():
    torch.testing.assert_close(
        probabilities(LOGITS, SamplingParams(1.0, top_k=2)), torch.tensor([[0.0, 2 / 3, 1 / 3, 0.0]])
    )


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.4, [0.0, 1.0, 0.0, 0.0]),
        # The first token alone has mass 0.5, not enough for 0.6: the second stays too.
        (0.6, [0.0, 2 / 3, 1 / 3, 0.0]),
        (1.0, [0.125, 0.5, 0.25, 0.125]),
    ],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p, expected):
    torch.testing.assert_close(
        probabilities(LOGITS, SamplingParams(1.0, top_p=top_p)), torch.tensor([expected]), rtol=1e-5, atol=1e-6
    )


def test_top_p_counts_mass_after_top_k():
    # After top-k 2 the masses are 2/3 and 1/3, so 0.6 is reached by the first alone.
    assert probabilities(LOGITS, SamplingParams(1.0, top_k=2, top_p=0.6)).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_low_precision_logits_give_float32_probabilities():
    probs = probabilities(LOGITS.bfloat16(), SamplingParams(1.0))
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(1))


def test_draws_follow_their_law():
    law = torch.tensor([0.5, 0.25, 0.125, 0.125])
    tokens = draw(law.expand(4, 1000, -1), torch.Generator().manual_seed(0))
    assert tokens.shape == (4, 1000)
    counts = torch.bincount(tokens.flatten(), minlength=4)
    assert chi_square_p(counts, law) > 1e-4
    assert chi_square_p(counts, torch.full((4,), 0.25)) < 1e-6


def test_chooser_proposes_the_argmax_unless_it_samples():
    tokens, probs = Chooser()(LOGITS)
    assert tokens.tolist() == [1] and probs is None
    tokens, probs = Chooser(SamplingParams(0.0))(LOGITS)
    assert tokens.tolist() == [1] and probs is None
    torch.manual_seed(0)
    tokens, probs = Chooser(SamplingParams(1.0))(LOGITS.expand(2000, -1))
    torch.testing.assert_close(probs[0], torch.tensor([0.125, 0.5, 0.25, 0.125]))
    assert chi_square_p(torch.bincount(tokens, minlength=4), probs[0]) > 1e-4


def test_a_chooser_spends_one_number_a_slot():
    """At once or slot by slot; cumulated, the law is 0.125, 0.625, 0.875, 1."""
    uniforms, logits = torch.tensor([[[0.1, 0.2, 0.7]]]), LOGITS.expand(1, 1, 3, -1)
    at_once, _ = Chooser(SamplingParams(1.0), uniforms)(logits)
    choose = Chooser(SamplingParams(1.0), uniforms)
    one_by_one = [choose(logits[:, :, slot])[0].item() for slot in range(3)]
    assert at_once.flatten().tolist() == one_by_one == [0, 1, 2]


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    """A sum in float32 has steps of 6e-8 near 1; here every token but the first has 1e-9."""
    probs = torch.full((1, 100_000), 1e-9)
    probs[0, 0] = 1 - 1e-4
    uniforms = torch.linspace(1 - 1e-4, 1, 2001, dtype=torch.float64)[:-1]
    tokens = draw_at(probs.expand(2000, -1), uniforms)
    assert len(set(tokens.tolist())) > 1990 and tokens.max() < 100_000
