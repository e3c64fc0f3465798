"""What the target says of texts: hand-checkable numbers, its own texts pass, others are told from them."""

import math

import pytest
import torch
from conftest import counting_target, random_prompts, scripted_target, tiny_model

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling import probabilities
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.texts import authorship
from draft_opd_trl.texts.authorship import ShareWatch, TextFit, Watch, describe_misfit, likeliest_next, text_fit


GREEDY = SamplingParams()


def written(target, sampling, count=32, length=60, seed=0):
    prompts = random_prompts(count, vocab_size=target.vocab_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return speculate(target, None, prompts, SpeculationSettings(length, [], sampling, batch_size=count), generator)


@pytest.fixture(scope="module")
def target():
    """Entropy well between none and all."""
    return Target(tiny_model("qwen3", initializer_range=0.1))


def test_numbers_by_hand(monkeypatch):
    monkeypatch.setattr(authorship, "POWERS", (0.5, 2.0))
    # After any token: probabilities 1/2, 1/4, 1/4 of tokens 0, 1, 2, and next to none of the rest.
    law = torch.tensor([0.5, 0.25, 0.25, 1e-12]).log()
    rollout = Rollout.from_ids([[3, 3], [1]], [[0, 1], [2]])
    fit = text_fit(scripted_target(law.expand(4, 4)), rollout, SamplingParams(1.0), chunk_size=2)
    entropy, squares = 1.5 * math.log(2), 0.5 * math.log(2) ** 2 + 0.5 * math.log(4) ** 2
    assert fit.num_tokens.tolist() == [2, 1]
    assert fit.num_greedy.tolist() == [1, 0]
    # q ∝ p²: 1/4, 1/16, 1/16 of 3/8.
    powers = dict(zip(authorship.POWERS, fit.ratios.T, strict=True))
    torch.testing.assert_close(powers[2.0], torch.tensor([4 / 3, 2 / 3]).log() + torch.tensor([math.log(2 / 3), 0.0]))
    torch.testing.assert_close(fit.log_prob, torch.tensor([-math.log(8), -math.log(4)]))
    torch.testing.assert_close(fit.entropy, torch.tensor([2 * entropy, entropy]))
    torch.testing.assert_close(fit.variance, torch.tensor([2, 1]) * (squares - entropy**2))
    assert fit.pooled().num_tokens == 3 and fit.pooled().agreement.item() == pytest.approx(1 / 3)
    torch.testing.assert_close(fit.pooled().ratios, fit.ratios.sum(0, keepdim=True))


def test_z_is_the_distance_in_standard_deviations():
    def fit(*values):
        return TextFit(*torch.tensor(values)[:, None], torch.zeros(1, 1))

    assert fit(10.0, 5.0, -20.0, 14.0, 9.0).z.item() == pytest.approx(-2)
    # Next to no variance: a distance of 0.1 nats is not many standard deviations.
    assert fit(10.0, 10.0, -0.1, 0.0, 1e-6).z.abs() < 1


def test_tokens_shut_out_by_top_k_have_a_floor():
    law = torch.tensor([0.5, 0.3, 0.2]).log()
    fit = text_fit(scripted_target(law.expand(3, 3)), Rollout.from_ids([[0]], [[2]]), SamplingParams(1.0, top_k=2))
    assert fit.log_prob.item() == -23 and math.isfinite(fit.entropy.item())


@pytest.mark.parametrize("sampling", [SamplingParams(0.8), SamplingParams(1.0, top_k=3), SamplingParams(1.3, 0, 0.8)])
def test_under_the_targets_law_a_ratio_is_one_on_average(sampling):
    """What all false-alarm rates rest on: Σ p(y) · q(y) / p(y) = 1, for each q."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -3.0])
    tokens = torch.arange(5)[:, None]
    fit = text_fit(scripted_target(logits.expand(5, 5)), Rollout.from_ids([[0]] * 5, tokens.tolist()), sampling)
    probs = probabilities(logits, sampling)
    torch.testing.assert_close((probs[:, None] * fit.ratios.exp())[probs > 0].sum(0), torch.ones(4))


def test_a_token_just_outside_top_k_speaks_for_nobody_and_one_far_outside_against():
    logits = torch.tensor([3.0, 2.0, 1.9999, 1.0, -1.0])
    tokens = [[0], [2], [3], [4]]
    fit = text_fit(
        scripted_target(logits.expand(5, 5)), Rollout.from_ids([[0]] * 4, tokens), SamplingParams(1.0, top_k=2)
    )
    assert (fit.ratios[1] == 0).all() and fit.is_targets().tolist() == [True, True, False, False]


def test_a_near_tie_counts_as_greedy():
    """What bf16 kernels explain: a step of 1/256 of the largest logit, and three of them at most."""
    table = torch.tensor([20.0, 19.8, 19.5]).expand(3, 3)
    fit = text_fit(scripted_target(table), Rollout.from_ids([[0], [0]], [[1, 1], [2, 2]]), GREEDY)
    assert fit.agreement.tolist() == [1.0, 0.0]
    assert fit.is_targets().tolist() == [True, False]


def test_the_ratio_at_temperature_0_by_hand():
    table = torch.tensor([16.0, 15.875]).expand(2, 2)  # two steps apart
    fit = text_fit(scripted_target(table), Rollout.from_ids([[0], [0]], [[0], [1]]), GREEDY)
    other = (table[0] / 0.3).log_softmax(-1)
    assert fit.ratios[0, 1].item() == pytest.approx(other[0].item(), rel=1e-4)
    assert fit.ratios[1, 1].item() == pytest.approx(other[1].item() - (math.log(0.5) - 2), rel=1e-4)


@pytest.mark.parametrize("size", [0.6, 1.0])
def test_greedy_text_of_noisy_kernels_passes(size):
    """Near-ties everywhere, which noise of up to the size allowed for decides: no more texts fail than stated."""
    generator = torch.Generator().manual_seed(0)
    table = 20 + torch.rand((64, 64), generator=generator).sort(-1).values
    kernels = size * authorship.KERNEL_NOISE * 21 / 2**0.5  # of each logit; of a difference it is √2 of that
    texts = []
    for _ in range(500):
        text = [0]
        for _ in range(20):
            text.append((table[text[-1]] + kernels * torch.randn(64, generator=generator)).argmax().item())
        texts.append(text)
    rollout = Rollout.from_ids([text[:1] for text in texts], [text[1:] for text in texts])
    fit = text_fit(scripted_target(table), rollout, GREEDY)
    assert (fit.ratios.exp().mean(0) < 1).all()
    assert (~fit.is_targets()).sum() <= 1
    watch = Watch(fit.ratios.shape[1])
    for ratios in fit.ratios.tolist():
        watch.add(ratios)
        assert not watch.alarmed


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0), SamplingParams(0.7, top_k=8, top_p=0.9)])
def test_the_targets_own_texts_pass(target, sampling):
    fit = text_fit(target, written(target, sampling), sampling)
    assert describe_misfit(fit, sampling) is None
    assert fit.is_targets().all()


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
    assert fit.is_targets().any() == (not sampling.greedy)


def test_likeliest_next():
    rollout = Rollout.from_ids([[1, 2], [5]], [[3], [6, 7]])
    assert likeliest_next(counting_target(), rollout, [0, 4])[0] == 4
    assert likeliest_next(counting_target(), rollout, [8, 4]) == [4, 8]


def alarm_after(watch, ratios):
    for count, ratio in enumerate(ratios, 1):
        watch.add(ratio)
        if watch.alarmed:
            return count
    return None


def test_a_watch_never_forgives_a_change_for_the_texts_before_it():
    """A sum over all texts would first have to make up for the good ones."""
    for good in (0, 64, 1000):
        assert alarm_after(Watch(2), [[-1.0, -0.5]] * good + [[-1.0, 0.5]] * 100) == good + 30  # log 2·10⁶ = 14.5


def test_a_watch_is_calm_again():
    watch = Watch(1)
    watch.add([2.0])
    assert not watch.calm and not watch.alarmed
    watch.add([-2.0])
    assert watch.calm


@pytest.mark.parametrize("served", [1.1, 0.9])
def test_a_temperature_a_tenth_off_is_noticed_and_the_right_one_is_not(target, served):
    asked = SamplingParams(1.0)
    right = text_fit(target, written(target, asked, count=400), asked).ratios.tolist()
    wrong = text_fit(target, written(target, SamplingParams(served), count=400), asked).ratios.tolist()
    assert alarm_after(Watch(4), right) is None
    assert alarm_after(Watch(4), wrong) < 300
    assert 400 < alarm_after(Watch(4), right + wrong) < 700


def test_false_alarms_are_as_rare_as_stated(monkeypatch):
    """With odds of 50 in place of a million, an alarm comes after 50 texts on average or later."""
    monkeypatch.setattr(authorship, "ALARM_ODDS", 50.0)
    generator, waits = torch.Generator().manual_seed(0), []
    for _ in range(200):
        # Two other laws against a standard normal one, shifted by ±1.
        draws = torch.randn(2000, generator=generator)
        waits.append(alarm_after(Watch(2), torch.stack([draws - 0.5, -draws - 0.5], 1).tolist()) or 2000)
    assert sum(waits) / len(waits) > 50


def test_shares():
    def alarm(*shares):
        watch, generator = ShareWatch(0.05, 0.3), torch.Generator().manual_seed(0)
        for number, share in enumerate(share for share in shares for _ in range(1000)):
            watch.count(torch.rand((), generator=generator).item() < share)
            if watch.alarmed:
                return number
        return None

    assert alarm(0.05) is None and alarm(0.0, 0.05) is None
    assert alarm(1.0) == 7
    assert 1000 < alarm(0.05, 0.3) < 1100
