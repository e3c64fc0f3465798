"""What the target says of texts: hand-checkable numbers, its own texts pass, others are told from them."""

import math

import pytest
import torch
from conftest import counting_target, random_prompts, scripted_target, tiny_model

from draft_opd_trl.consistency import TextFit, describe_misfit, likeliest_next, text_fit
from draft_opd_trl.records import Rollout
from draft_opd_trl.sampling import SamplingParams
from draft_opd_trl.speculation import SpeculationSettings, speculate
from draft_opd_trl.target import Target


GREEDY = SamplingParams()


def written(target, sampling, count=32, length=60, seed=0):
    prompts = random_prompts(count, vocab_size=target.vocab_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return speculate(target, None, prompts, SpeculationSettings(length, [], sampling, batch_size=count), generator)


@pytest.fixture(scope="module")
def target():
    """Entropy well between none and all."""
    return Target(tiny_model("qwen3", initializer_range=0.1))


def test_numbers_by_hand():
    # After any token: probabilities 1/2, 1/4, 1/4 of tokens 0, 1, 2, and next to none of the rest.
    law = torch.tensor([0.5, 0.25, 0.25, 1e-30]).log()
    rollout = Rollout.from_ids([[3, 3], [1]], [[0, 1], [2]])
    fit = text_fit(scripted_target(law.expand(4, 4)), rollout, SamplingParams(1.0), chunk_size=2)
    entropy, squares = 1.5 * math.log(2), 0.5 * math.log(2) ** 2 + 0.5 * math.log(4) ** 2
    assert fit.num_tokens.tolist() == [2, 1]
    assert fit.num_greedy.tolist() == [1, 0]
    torch.testing.assert_close(fit.log_prob, torch.tensor([-math.log(8), -math.log(4)]))
    torch.testing.assert_close(fit.entropy, torch.tensor([2 * entropy, entropy]))
    torch.testing.assert_close(fit.variance, torch.tensor([2, 1]) * (squares - entropy**2))
    assert fit.pooled().num_tokens == 3 and fit.pooled().agreement == pytest.approx(1 / 3)


def test_z_is_the_distance_in_standard_deviations():
    fit = TextFit(*(torch.tensor([value]) for value in (10.0, 5.0, -20.0, 14.0, 9.0)))
    assert fit.z.item() == pytest.approx(-2)
    # Next to no variance: a distance of 0.1 nats is not many standard deviations.
    assert TextFit(*(torch.tensor([value]) for value in (10.0, 10.0, -0.1, 0.0, 1e-6))).z.abs() < 1


def test_tokens_shut_out_by_top_k_have_a_floor():
    law = torch.tensor([0.5, 0.3, 0.2]).log()
    fit = text_fit(scripted_target(law.expand(3, 3)), Rollout.from_ids([[0]], [[2]]), SamplingParams(1.0, top_k=2))
    assert fit.log_prob.item() == -23 and math.isfinite(fit.entropy.item())


def test_a_near_tie_counts_as_greedy():
    table = torch.tensor([1.0, 0.8, 0.0]).expand(3, 3)
    fit = text_fit(scripted_target(table), Rollout.from_ids([[0], [0]], [[1, 1], [2, 2]]), GREEDY)
    assert fit.agreement.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0), SamplingParams(0.7, top_k=8, top_p=0.9)])
def test_the_targets_own_texts_pass(target, sampling):
    fit = text_fit(target, written(target, sampling), sampling)
    assert describe_misfit(fit, sampling) is None
    assert fit.is_targets(sampling).all()


def test_z_of_the_targets_own_texts_is_standard(target):
    sampling = SamplingParams(0.9, top_k=20, top_p=0.95)
    z = text_fit(target, written(target, sampling, count=200), sampling).z
    assert abs(float(z.mean())) < 3 / 200**0.5
    assert 0.8 < float(z.std()) < 1.2


@pytest.mark.parametrize(
    ("wrote", "stated"),
    [(1.0, 0.0), (0.7, 0.0), (0.0, 1.0), (1.0, 0.6), (0.6, 1.0)],
)
def test_another_temperature_is_told(target, wrote, stated):
    fit = text_fit(target, written(target, SamplingParams(wrote)), SamplingParams(stated))
    message = describe_misfit(fit, SamplingParams(stated))
    assert f"do not look like the target's own at temperature={stated}" in message
    assert "over 1920 tokens of 32 texts" in message and "Set `temperature`" in message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_another_model_is_told(target, temperature):
    sampling = SamplingParams(temperature)
    other = Target(tiny_model("qwen3", seed=9, initializer_range=0.1))
    fit = text_fit(target, written(other, sampling), sampling)
    assert describe_misfit(fit, sampling) is not None
    # One text tells where the target is certain of each token; where it draws, it takes a sample of them.
    assert fit.is_targets(sampling).any() == (not sampling.greedy)


def test_likeliest_next():
    rollout = Rollout.from_ids([[1, 2], [5]], [[3], [6, 7]])
    assert likeliest_next(counting_target(), rollout, [0, 4])[0] == 4
    assert likeliest_next(counting_target(), rollout, [8, 4]) == [4, 8]
