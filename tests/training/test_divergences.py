"""Divergences on three tokens by hand, clamps, and settings that make no sense."""

import math

import pytest
import torch
from by_hand import P, Q, kl

from draft_opd_trl.training.divergences import LOSSES, LossSettings, divergence


DRAFT, TARGET = torch.tensor([Q]).log(), torch.tensor([P]).log()


def _one(kind, token=0, **settings):
    settings = {"temperature": 1.0, **settings}
    return divergence(DRAFT, TARGET, torch.tensor([token]), LossSettings(kind, **settings)).item()


def test_cross_entropy():
    assert _one("ce") == pytest.approx(math.log(2))
    assert _one("ce", token=2) == pytest.approx(math.log(4))


def test_forward_kl():
    # 1/4 ln(1/2) + 0 + 1/2 ln 2 = 1/4 ln 2
    assert _one("forward_kl") == pytest.approx(math.log(2) / 4) == pytest.approx(kl(P, Q))


def test_reverse_kl_is_the_other_way_round():
    draft, target = torch.tensor([[0.8, 0.1, 0.1]]).log(), torch.tensor([[0.4, 0.4, 0.2]]).log()
    settings = LossSettings("reverse_kl", 1.0)
    expected = 0.8 * math.log(2) + 0.1 * math.log(0.25) + 0.1 * math.log(0.5)
    got = divergence(draft, target, torch.tensor([0]), settings).item()
    assert got == pytest.approx(expected) == pytest.approx(kl((0.8, 0.1, 0.1), (0.4, 0.4, 0.2)))
    assert got != pytest.approx(kl((0.4, 0.4, 0.2), (0.8, 0.1, 0.1)), rel=1e-2)


def test_total_variation_is_the_rejected_mass():
    # 1 − (1/4 + 1/4 + 1/4)
    assert _one("tv") == pytest.approx(0.25)


def test_log_acceptance():
    assert _one("log_acceptance") == pytest.approx(-math.log(0.75))


def test_the_mixture_that_dspark_was_published_with():
    # 0.1 (−ln 1/4) + 0.9 Σ|p − q|; the teacher's token is that of the text, or at temperature 0 all there is
    assert _one("ce_tv", token=2) == pytest.approx(0.1 * math.log(4) + 0.9 * 0.5)
    assert _one("ce_tv", temperature=0.0) == pytest.approx(0.1 * math.log(2) + 0.9 * 2 * 0.5)


def test_lk_blends_by_how_much_is_accepted():
    share = math.exp(-3 * 0.75)
    assert _one("lk") == pytest.approx(share * kl(P, Q) + (1 - share) * 0.25)
    # The share is not differentiated.
    draft = DRAFT.clone().requires_grad_()
    divergence(draft, TARGET, torch.tensor([0]), LossSettings("lk", 1.0)).sum().backward()
    parts = []
    for kind in ("forward_kl", "tv"):
        alone = DRAFT.clone().requires_grad_()
        divergence(alone, TARGET, torch.tensor([0]), LossSettings(kind, 1.0)).sum().backward()
        parts.append(alone.grad)
    torch.testing.assert_close(draft.grad, share * parts[0] + (1 - share) * parts[1])


def test_with_a_point_mass_acceptance_is_the_drafters_probability():
    hard = {kind: _one(kind, temperature=0.0) for kind in ("tv", "accepted_length", "lk")}
    assert hard["tv"] == hard["accepted_length"] == pytest.approx(0.5)
    share = math.exp(-1.5)
    assert hard["lk"] == pytest.approx(share * math.log(2) + (1 - share) * 0.5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd(beta):
    mixture = tuple(beta * p + (1 - beta) * q for p, q in zip(P, Q, strict=True))
    assert _one("jsd", beta=beta) == pytest.approx(beta * kl(P, mixture) + (1 - beta) * kl(Q, mixture), rel=1e-5)


def test_jsd_limits():
    assert _one("jsd", beta=0.0) == pytest.approx(kl(P, Q))
    assert _one("jsd", beta=1.0) == pytest.approx(kl(Q, P))
    # Near its ends jsd / β and jsd / (1 − β) go to the two KLs.
    draft, target = torch.tensor([[0.8, 0.1, 0.1]]).double().log(), torch.tensor([[0.4, 0.4, 0.2]]).double().log()
    for beta, expected in (
        (1e-5, kl((0.4, 0.4, 0.2), (0.8, 0.1, 0.1))),
        (1 - 1e-5, kl((0.8, 0.1, 0.1), (0.4, 0.4, 0.2))),
    ):
        loss = divergence(draft, target, torch.tensor([0]), LossSettings("jsd", 1.0, beta=beta)).item()
        assert loss / min(beta, 1 - beta) == pytest.approx(expected, rel=1e-3)


def test_bernoulli_forward_kl():
    # Token 0: p = 1/4, q = 1/2.
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert _one("bernoulli_forward_kl") == pytest.approx(expected, rel=1e-5)
    assert _one("bernoulli_forward_kl", token=1) == pytest.approx(0, abs=1e-6)


def test_k3():
    # Token 0: ratio 1/2, so 1/2 − 1 + ln 2. Token 2: ratio 2, so 1 − ln 2.
    assert _one("k3") == pytest.approx(math.log(2) - 0.5, rel=1e-5)
    assert _one("k3", token=2) == pytest.approx(1 - math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind not in ("ce", "ce_tv")])
def test_no_divergence_between_equals(kind):
    loss = divergence(TARGET, TARGET, torch.tensor([1]), LossSettings(kind, 1.0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_max_clamp_at_its_edge():
    assert _one("ce", max_clamp=0.5) == 0.5
    assert _one("ce", max_clamp=0.7) == pytest.approx(math.log(2))
    draft = DRAFT.clone().requires_grad_()
    divergence(draft, None, torch.tensor([0]), LossSettings("ce", 0.0, max_clamp=0.5)).sum().backward()
    assert draft.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["k3", "bernoulli_forward_kl"])
def test_log_prob_min_clamp(kind):
    """Far below the floor both estimators read the floor itself, and above it they read the value."""
    low = torch.tensor([[0.0, -50.0, -50.0]])
    floor = -2.0
    clamped = divergence(low, TARGET, torch.tensor([1]), LossSettings(kind, 1.0, log_prob_min_clamp=floor)).item()
    p, q = 0.25, math.exp(floor)
    expected = {
        "k3": p / q - 1 - math.log(p / q),
        "bernoulli_forward_kl": p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)),
    }[kind]
    assert clamped == pytest.approx(expected, rel=1e-4)
    # Not touched: log 1/2 and log 1/4 lie above it.
    assert _one(kind, log_prob_min_clamp=floor) == pytest.approx(_one(kind))


def test_k3_without_a_clamp_explodes_where_the_clamped_one_does_not():
    low = torch.tensor([[0.0, -30.0, -30.0]])
    free = divergence(low, TARGET, torch.tensor([1]), LossSettings("k3", 1.0)).item()
    assert free > 1e10
    assert divergence(low, TARGET, torch.tensor([1]), LossSettings("k3", 1.0, max_clamp=10.0)).item() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hinge", 1.0), "`kind` is .hinge.; it must be one of ce, forward_kl"),
        (("ce", -1.0), "`temperature` is -1.0; it must be 0, or lie in"),
        (
            ("forward_kl", 0.0),
            "Loss 'forward_kl' compares distributions.*Use one of ce, tv, lk",
        ),
        (("jsd", 1.0, 1.5), r"`beta` is 1.5; it must lie in \[0, 1\]"),
    ],
)
def test_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(*arguments)
