"""Divergences on three tokens by hand, the chunked path against the reference, clamps and the denominator."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB, tiny_model
from torch.nn import functional

from draft_opd_trl.losses import (
    HARD_LOSSES,
    LOSSES,
    Heads,
    LossSettings,
    batch_loss,
    divergence,
    hard_tokens,
    slot_losses,
    stream_loss,
    uses_kernel,
)
from draft_opd_trl.records import DraftBlocks, ReplayBatch
from draft_opd_trl.target import Target


# The drafter's and the target's distribution over three tokens.
Q, P = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
DRAFT, TARGET = torch.tensor([Q]).log(), torch.tensor([P]).log()


def _kl(first, second):
    return sum(a * math.log(a / b) for a, b in zip(first, second, strict=True))


def _one(kind, token=0, **settings):
    settings = {"temperature": 1.0, **settings}
    return divergence(DRAFT, TARGET, torch.tensor([token]), LossSettings(kind, **settings)).item()


def test_cross_entropy():
    assert _one("ce") == pytest.approx(math.log(2))
    assert _one("ce", token=2) == pytest.approx(math.log(4))


def test_forward_kl():
    # 1/4 ln(1/2) + 0 + 1/2 ln 2 = 1/4 ln 2
    assert _one("forward_kl") == pytest.approx(math.log(2) / 4) == pytest.approx(_kl(P, Q))


def test_reverse_kl_is_the_other_way_round():
    draft, target = torch.tensor([[0.8, 0.1, 0.1]]).log(), torch.tensor([[0.4, 0.4, 0.2]]).log()
    settings = LossSettings("reverse_kl", 1.0)
    expected = 0.8 * math.log(2) + 0.1 * math.log(0.25) + 0.1 * math.log(0.5)
    got = divergence(draft, target, torch.tensor([0]), settings).item()
    assert got == pytest.approx(expected) == pytest.approx(_kl((0.8, 0.1, 0.1), (0.4, 0.4, 0.2)))
    assert got != pytest.approx(_kl((0.4, 0.4, 0.2), (0.8, 0.1, 0.1)), rel=1e-2)


def test_total_variation_is_the_rejected_mass():
    # 1 − (1/4 + 1/4 + 1/4)
    assert _one("tv") == pytest.approx(0.25)


def test_log_acceptance():
    assert _one("log_acceptance") == pytest.approx(-math.log(0.75))


def test_lk_blends_by_how_much_is_accepted():
    share = math.exp(-3 * 0.75)
    assert _one("lk") == pytest.approx(share * _kl(P, Q) + (1 - share) * 0.25)
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
    assert _one("jsd", beta=beta) == pytest.approx(beta * _kl(P, mixture) + (1 - beta) * _kl(Q, mixture), rel=1e-5)


def test_jsd_limits():
    assert _one("jsd", beta=0.0) == pytest.approx(_kl(P, Q))
    assert _one("jsd", beta=1.0) == pytest.approx(_kl(Q, P))
    # Near its ends jsd / β and jsd / (1 − β) go to the two KLs.
    draft, target = torch.tensor([[0.8, 0.1, 0.1]]).double().log(), torch.tensor([[0.4, 0.4, 0.2]]).double().log()
    for beta, expected in (
        (1e-5, _kl((0.4, 0.4, 0.2), (0.8, 0.1, 0.1))),
        (1 - 1e-5, _kl((0.8, 0.1, 0.1), (0.4, 0.4, 0.2))),
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


@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "ce"])
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


# -- the chunked path ----------------------------------------------------------------------------------------------


def _heads(weight, target_logits, vocab_map=None, target_weight=None):
    """A drafter whose head is a plain product."""

    def draft_logits(states):
        return functional.linear(states.to(weight.dtype), weight)

    return Heads(draft_logits, target_logits, vocab_map, weight, target_weight)


def _problem(reduced, dtype=torch.float32, slots=13, width=6, size=11):
    draws = torch.Generator().manual_seed(0)
    vocab_map = torch.tensor([1, 2, 5, 7, 10]) if reduced else None
    hidden = torch.randn(slots, width, generator=draws).to(dtype).requires_grad_()
    states = torch.randn(slots, width, generator=draws).to(dtype)
    head = torch.randn(size, width, generator=draws).to(dtype)
    draft_weight = torch.randn(5 if reduced else size, width, generator=draws).to(dtype).requires_grad_()
    tokens = torch.randint(5 if reduced else size, (slots,), generator=draws)

    def target_logits(states):
        return states.float() @ head.float().T

    return hidden, states, tokens, _heads(draft_weight, target_logits, vocab_map, head)


def _reference(hidden, states, tokens, heads, settings):
    draft_logps = (hidden.float() @ heads.draft_weight.float().T).log_softmax(-1)
    logits = heads.target_logits(states)
    if heads.vocab_map is not None:
        logits = logits[:, heads.vocab_map]
    target_logps = None if settings.hard else (logits / settings.temperature).log_softmax(-1)
    losses = divergence(draft_logps, target_logps, tokens, settings)
    if heads.vocab_map is not None and not settings.reads_token:
        best = heads.target_logits(states).argmax(-1)
        outside = 1.0 if settings.kind == "accepted_length" else 0.0
        losses = torch.where((best[:, None] == heads.vocab_map).any(-1), losses, outside)
    return losses


@pytest.mark.parametrize("chunk_size", [1, 4, 13, 256])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(
    ("kind", "temperature"), [*((kind, 0.7) for kind in LOSSES), *((kind, 0.0) for kind in HARD_LOSSES)]
)
def test_chunked_equals_reference(kind, temperature, reduced, chunk_size):
    """Invariant 4, loss part: values and gradients."""
    settings = LossSettings(kind, temperature, beta=0.3, max_clamp=6.0, log_prob_min_clamp=-8.0)
    weights = torch.linspace(0.1, 1, 13)
    results = []
    for function in (_reference, lambda *arguments: slot_losses(*arguments, chunk_size=chunk_size)[0]):
        hidden, states, tokens, heads = _problem(reduced)
        losses = function(hidden, states, tokens, heads, settings)
        (losses * weights).sum().backward()
        results.append((losses.detach(), hidden.grad, heads.draft_weight.grad))
    assert results[0][1].abs().sum() > 0
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


KERNEL_CASES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.0), ("jsd", 0.3), ("jsd", 1.0)]


@pytest.mark.parametrize("chunk_size", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize("temperature", [0.7, 1.6])
@pytest.mark.parametrize(("kind", "beta"), KERNEL_CASES)
def test_the_kernel_equals_the_reference(monkeypatch, kind, beta, temperature, reduced, dtype, chunk_size):
    """Values and gradients, a clamped slot and one outside the draft vocabulary among them."""
    ceiling = 0.3 if beta == 0.3 else 2.0
    settings = LossSettings(kind, temperature, beta=beta, max_clamp=ceiling)
    monkeypatch.setattr("draft_opd_trl.losses.uses_kernel", lambda *_: True)
    results = []
    for function in (_reference, lambda *arguments: slot_losses(*arguments, chunk_size=chunk_size)[0]):
        hidden, states, tokens, heads = _problem(reduced, dtype)
        losses = function(hidden, states, tokens, heads, settings)
        (losses * torch.linspace(0.1, 1, 13)).sum().backward()
        results.append((losses.detach(), hidden.grad, heads.draft_weight.grad))
    expected, got = results
    assert (expected[0] == ceiling).any() and (expected[0] < ceiling).any() and (expected[0] == 0).any() == reduced
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    # Gradients leave in the weights' own dtype.
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(got[1:], expected[1:], **close)


@pytest.mark.parametrize("kind", LOSSES)
def test_the_kernel_is_chosen_on_cuda_only_and_for_what_it_covers_only(kind):
    settings = LossSettings(kind, 1.0)
    _, _, _, heads = _problem(reduced=True)
    frozen = replace(heads, draft_weight=heads.draft_weight.detach())
    assert uses_kernel(torch.device("cuda", 0), frozen, settings) == (kind in ("forward_kl", "reverse_kl", "jsd"))
    assert not uses_kernel(torch.device("cpu"), frozen, settings)
    assert not uses_kernel(torch.device("cuda"), heads, settings), "a head in training"
    assert not uses_kernel(torch.device("cuda"), replace(frozen, target_weight=None), settings)


@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_states_lose_little(kind):
    """Heads multiply in the states' dtype; everything behind them is float32."""
    settings = LossSettings(kind, 0.7, beta=0.3, max_clamp=6.0, log_prob_min_clamp=-8.0)
    hidden, states, tokens, heads = _problem(False)
    expected, _ = slot_losses(hidden, states, tokens, heads, settings)
    half = _heads(heads.draft_weight.bfloat16(), heads.target_logits)
    got, _ = slot_losses(hidden.bfloat16(), states, tokens, half, settings, chunk_size=4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_no_slots():
    hidden, states, tokens, heads = _problem(False)
    none = slice(0, 0)
    losses, _ = slot_losses(hidden[none], states[none], tokens[none], heads, LossSettings("ce", 0.0))
    assert losses.shape == (0,)


def test_the_teacher_temperature_sharpens():
    hidden, states, tokens, heads = _problem(False)
    expected = _reference(hidden, states / 0.5, tokens, heads, LossSettings("forward_kl", 1.0))
    got, _ = slot_losses(hidden, states, tokens, heads, LossSettings("forward_kl", 0.5))
    torch.testing.assert_close(got, expected)


def test_the_soft_cap_of_the_target_is_honoured():
    target = Target(tiny_model("gemma3", final_logit_softcapping=2.0))
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (1, 9), generator=draws)
    hidden = torch.randn(9, target.hidden_size, generator=draws)
    _, states = target.forward_text(tokens, ())
    with torch.no_grad():
        # What the model itself says, cap included.
        teacher = target.model(input_ids=tokens).logits[0].log_softmax(-1)
        draft = (hidden @ target.head.weight.T).log_softmax(-1)
    expected = (teacher.exp() * (teacher - draft)).sum(-1)
    heads = _heads(target.head.weight, target.logits)
    got, _ = slot_losses(hidden, states[0], tokens[0], heads, LossSettings("forward_kl", 1.0), chunk_size=4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# -- streams and batches -------------------------------------------------------------------------------------------


def _identity_heads(size=3, vocab_map=None):
    """States are log-probabilities themselves."""
    weight = torch.eye(size)
    return _heads(weight if vocab_map is None else weight[vocab_map], lambda states: states, vocab_map)


def test_stream_loss_by_hand():
    hidden = torch.tensor([[Q, P]]).log().requires_grad_()
    tokens = torch.tensor([[0, 2]])
    settings = LossSettings("ce", 0.0)
    loss, _ = stream_loss(hidden, hidden.detach(), tokens, torch.tensor([[1.0, 0.5]]), _identity_heads(), settings)
    assert loss.item() == pytest.approx(1.5 * math.log(2))
    only_second, _ = stream_loss(
        hidden, hidden.detach(), tokens, torch.tensor([[0.0, 1.0]]), _identity_heads(), settings
    )
    only_second.backward()
    assert hidden.grad[0, 0].abs().sum() == 0 and hidden.grad[0, 1].abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["hard", "soft"])
def test_accepted_length_counts_slots_while_all_before_are_accepted(temperature):
    hidden = torch.tensor([[Q, P, Q], [P, Q, Q]]).log().requires_grad_()
    states = torch.tensor([[P, P, P], [Q, Q, Q]]).log()
    tokens = torch.tensor([[0, 2, 1], [0, 0, 0]])
    # Acceptance by slot: the drafter's probability of the hard token, or the overlap. The last slot of row 2 is out.
    first, second = ((0.5, 0.5, 0.25), (0.25, 0.5)) if temperature == 0 else ((0.75, 1.0, 0.75), (0.75, 1.0))
    weights = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    settings = LossSettings("accepted_length", temperature)
    loss, _ = stream_loss(hidden, states, tokens, weights, _identity_heads(), settings)
    expected = [3 - first[0] * (1 + first[1] * (1 + first[2])), 1.5 - second[0] * (1 + 0.5 * second[1])]
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)
    loss.sum().backward()
    assert hidden.grad[0, [0, 2]].abs().sum(-1).min() > 0 and hidden.grad[1, 2].abs().sum() == 0


def test_a_stream_without_slots_is_zero_and_differentiable():
    hidden = torch.zeros(2, 2, 3, requires_grad=True)
    tokens = torch.zeros((2, 2), dtype=torch.long)
    heads = _heads(torch.eye(3, requires_grad=True), lambda states: states)
    loss, _ = stream_loss(hidden, hidden, tokens, torch.zeros(2, 2), heads, LossSettings("ce", 0.0))
    loss.sum().backward()
    assert loss.tolist() == [0, 0] and hidden.grad.abs().sum() == 0
    assert heads.draft_weight.grad.abs().sum() == 0, "a drafter's own head must not be without a gradient"


def test_tokens_outside_the_draft_vocabulary_carry_no_loss():
    vocab_map = torch.tensor([0, 2])
    hidden = torch.tensor([[Q, Q, Q]]).log().requires_grad_()
    tokens = torch.tensor([[0, 1, 2]])
    heads = _identity_heads(vocab_map=vocab_map)
    loss, _ = stream_loss(hidden, hidden.detach(), tokens, torch.ones(1, 3), heads, LossSettings("ce", 0.0))
    # Over tokens 0 and 2 the drafter says 2/3 and 1/3; token 1 is not there to be said.
    assert loss.item() == pytest.approx(math.log(1.5) + math.log(3))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tv", "log_acceptance", "lk"])
def test_slots_whose_target_argmax_lies_outside_the_draft_vocabulary_carry_no_loss(kind):
    """The published rule for soft targets: the most likely token decides, not the one the text happens to hold."""
    heads = _identity_heads(vocab_map=torch.tensor([0, 2]))
    hidden = torch.tensor([[Q, Q]]).log().requires_grad_()
    outside, within = (0.2, 0.6, 0.2), P
    states = torch.tensor([[outside, within]]).log()
    text = torch.tensor([[0, 1]])
    loss, _ = stream_loss(hidden, states, text, torch.ones(1, 2), heads, LossSettings(kind, 1.0))
    # Over tokens 0 and 2 the drafter says 2/3 and 1/3, the target of the second slot 1/3 and 2/3.
    draft, target = torch.tensor([[2 / 3, 1 / 3]]).log(), torch.tensor([[1 / 3, 2 / 3]]).log()
    expected = divergence(draft, target, torch.tensor([0]), LossSettings(kind, 1.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert hidden.grad[0, 0].abs().sum() == 0 and hidden.grad[0, 1].abs().sum() > 0


def _batch(draft_states=True):
    blocks = DraftBlocks(*(torch.tensor(value) for value in ([0], [1], [[0, 1]], [0], [2])))
    return ReplayBatch(
        tokens=torch.zeros((1, 4), dtype=torch.long),
        lengths=torch.tensor([4]),
        features=torch.zeros(1, 4, 1),
        blocks=blocks,
        labels=torch.tensor([[2, 2]]),
        states=torch.tensor([[P, P, P, P]]).log(),
        draft_states=torch.tensor([[P, Q]]).log() if draft_states else None,
        accepted_weights=torch.tensor([[1.0, 0.0]]),
        rejected_weights=torch.tensor([[0.5, 0.25]]),
        denominator=torch.tensor(7.0),
    )


def test_batch_loss_divides_by_the_global_denominator():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(hidden, _batch(), _identity_heads(), LossSettings("ce", 0.0), LossSettings("reverse_kl", 1.0))
    accepted = math.log(4)
    rejected = 0.5 * _kl(Q, P) + 0.25 * _kl(P, Q)
    assert parts["accepted_loss"].item() == pytest.approx(accepted)
    assert parts["rejected_loss"].item() == pytest.approx(rejected, rel=1e-5)
    # The denominator is given, not the batch's own weight of 1.75.
    assert parts["loss"].item() == pytest.approx((accepted + rejected) / 7, rel=1e-5)
    assert parts["block_losses"].tolist() == pytest.approx([accepted + rejected], rel=1e-5)


def test_batch_loss_without_a_rejected_stream():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(hidden, _batch(False), _identity_heads(), LossSettings("ce", 0.0), LossSettings("ce", 0.0))
    assert parts["rejected_loss"].item() == 0
    assert parts["loss"].item() == pytest.approx(math.log(4) / 7)


def test_rejected_cross_entropy_reads_the_targets_argmax():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(hidden, _batch(), _identity_heads(), LossSettings("ce", 0.0), LossSettings("ce", 0.0))
    # Given the drafted prefix the target's tokens are 2 (from P) and 0 (from Q), not the drafted 0 and 1.
    assert parts["rejected_loss"].item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(4), rel=1e-5)


def test_hard_tokens_only_where_weighted():
    states = torch.tensor([[P, Q], [P, P]]).log()
    tokens = hard_tokens(states, torch.tensor([[1.0, 1.0], [0.0, 0.5]]), _identity_heads(), chunk_size=2)
    assert tokens.tolist() == [[2, 0], [0, 2]]


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


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["hard", "soft"])
def test_a_token_that_cannot_be_drafted_ends_an_accepted_run(temperature):
    """As over the whole vocabulary, where the drafter gives that token nothing."""
    vocab_map, settings = torch.tensor([0, 2]), LossSettings("accepted_length", temperature)
    hidden = torch.tensor([[Q, Q, Q], [Q, Q, Q]]).log().requires_grad_()
    # The second slot of the first row wants token 1, surely.
    sure = [[1 - 2e-6, 1e-6, 1e-6], [1e-6, 1 - 2e-6, 1e-6]]
    states = torch.tensor([[sure[0], sure[1], sure[0]], [sure[0]] * 3]).log()
    tokens = torch.tensor([[0, 1, 0], [0, 0, 0]])
    loss, _ = stream_loss(hidden, states, tokens, torch.ones(2, 3), _identity_heads(vocab_map=vocab_map), settings)
    dense = hidden.detach().clone()
    dense[..., 1] = -1e4
    expected, _ = stream_loss(dense, states, tokens, torch.ones(2, 3), _identity_heads(), settings)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert loss[0].item() == pytest.approx(1 / 3 + 1 + 1, rel=1e-4)
    loss[0].backward()
    assert hidden.grad[0, 0].abs().sum() > 0 and hidden.grad[0, 1:].abs().sum() == 0
