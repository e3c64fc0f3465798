"""The chunked path against the reference, streams, batches and the denominator; a loss of the drafter's own."""

import math
from dataclasses import replace

import pytest
import torch
from by_hand import P, Q, kl
from conftest import VOCAB, tiny_model
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from draft_opd_trl.core.records import DraftBlocks, ReplayBatch
from draft_opd_trl.core.target import Target
from draft_opd_trl.training.divergences import HARD_LOSSES, LOSSES, LossSettings, StreamLosses, divergence
from draft_opd_trl.training.losses import (
    Heads,
    batch_loss,
    hard_tokens,
    slot_losses,
    stream_loss,
    uses_kernel,
)


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


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("chunk_size", [1, 4, 13, 256])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(
    ("kind", "temperature"), [*((kind, 0.7) for kind in LOSSES), *((kind, 0.0) for kind in HARD_LOSSES)]
)
def test_chunked_equals_reference(kind, temperature, reduced, chunk_size, frozen):
    """Invariant 4, loss part: values and gradients."""
    settings = LossSettings(kind, temperature, beta=0.3, max_clamp=6.0, log_prob_min_clamp=-8.0)
    weights = torch.linspace(0.1, 1, 13)
    results = []
    for function in (_reference, lambda *arguments: slot_losses(*arguments, chunk_size=chunk_size)[0]):
        hidden, states, tokens, heads = _problem(reduced)
        heads.draft_weight.requires_grad_(not frozen)
        losses = function(hidden, states, tokens, heads, settings)
        (losses * weights).sum().backward()
        results.append((losses.detach(), hidden.grad, heads.draft_weight.grad))
    assert results[0][1].abs().sum() > 0
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("frozen", "products"), [(False, 4), (True, 2)], ids=["trained head", "frozen head"])
def test_a_frozen_head_is_not_projected_through_again(frozen, products):
    """One product forward, one backward to the states; a head in training adds its own gradient's and a repetition."""
    hidden, states, tokens, heads = _problem(False)
    heads.draft_weight.requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        losses, _ = slot_losses(hidden, states, tokens, heads, LossSettings("ce", 0.0), chunk_size=4)
        losses.sum().backward()
    once = 2 * hidden.numel() * len(heads.draft_weight)
    assert counter.get_total_flops() == once * products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_under_a_frozen_head_keep_their_dtype_under_autocast(dtype):
    hidden, states, tokens, heads = _problem(False, dtype)
    heads.draft_weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = slot_losses(hidden, states, tokens, heads, LossSettings("ce", 0.0), chunk_size=4)
    assert losses.dtype == torch.float32
    losses.sum().backward()
    expected = torch.autograd.functional.jacobian(
        lambda rows: _reference(rows, states, tokens, heads, LossSettings("ce", 0.0)).sum(), hidden.detach().float()
    )
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.float(), expected, rtol=0.05, atol=0.05)


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
    monkeypatch.setattr("draft_opd_trl.training.losses.uses_kernel", lambda *_: True)
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


# -- D-PACE --------------------------------------------------------------------------------------------------------


def _weighed_by_hand(hidden, states, tokens, weights, heads, settings):
    """Block by block: slot losses of the reference, weights from detached probabilities of the tokens."""
    blocks = []
    for block in range(len(tokens)):
        total, count = torch.zeros(()), int((weights[block] > 0).sum())
        ids, inside = tokens[block], torch.ones(len(tokens[block]), dtype=torch.bool)
        if heads.vocab_map is not None:
            inside = (ids[:, None] == heads.vocab_map).any(-1)
            ids = torch.searchsorted(heads.vocab_map, ids).clamp(max=len(heads.vocab_map) - 1)
        losses = _reference(hidden[block], states[block], ids, heads, settings)
        if settings.reads_token:
            losses = losses * inside
        q = (hidden[block] @ heads.draft_weight.T).softmax(-1)[torch.arange(len(ids)), ids].detach() * inside
        smooth = (1 - settings.dpace_alpha) * q + settings.dpace_alpha
        for j in range(count):
            weight = sum(smooth[: m + 1].prod() for m in range(j, count))
            total = total + weights[block, j] * weight * losses[j]
        blocks.append(total)
    return torch.stack(blocks)


DPACE_CASES = [
    *(
        (kind, temperature, path)
        for kind, temperature in (("ce", 0.0), ("lk", 0.7))
        for path in ("one chunk", "chunks")
    ),
    *(("forward_kl", 0.7, path) for path in ("one chunk", "chunks", "kernel")),
]


@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(("kind", "temperature", "path"), DPACE_CASES)
def test_dpace_weighs_slots_as_by_hand(monkeypatch, kind, temperature, reduced, path):
    """Values and gradients, which do not flow through the weights; a clamp is of the loss alone."""
    if path == "kernel":
        monkeypatch.setattr("draft_opd_trl.training.losses.uses_kernel", lambda *_: True)
    settings = LossSettings(kind, temperature, max_clamp=2.0, dpace_alpha=0.5)
    weights = torch.tensor([[2.0, 1, 0.5], [1, 1, 0], [1, 0, 0], [0, 0, 0]])
    results = []
    for by_hand in (True, False):
        hidden, states, _, heads = _problem(reduced, slots=12)
        tokens = torch.tensor([[1, 4, 7], [2, 10, 3], [5, 0, 0], [0, 0, 0]])
        blocks = hidden.view(4, 3, -1), states.view(4, 3, -1), tokens, weights, heads, settings
        losses = _weighed_by_hand(*blocks) if by_hand else stream_loss(*blocks, 256 if path == "one chunk" else 2)[0]
        losses.sum().backward()
        results.append((losses.detach(), hidden.grad, heads.draft_weight.grad))
    assert results[0][0][:3].min() > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_without_smoothing_dpace_is_the_gradient_of_the_expected_run():
    """Σ_k Π q and Σ_j w_j log q_j move the drafter alike."""
    gradients = []
    for kind, alpha in (("accepted_length", None), ("ce", 1e-12)):
        hidden, states, tokens, heads = _problem(False, slots=12)
        settings = LossSettings(kind, 0.0, dpace_alpha=alpha)
        blocks = hidden.view(4, 3, -1), None, tokens.view(4, 3), torch.ones(4, 3), heads, settings
        stream_loss(*blocks)[0].sum().backward()
        gradients.append(hidden.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


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
        tokens=torch.tensor([[0, 0, 2, 2]]),
        lengths=torch.tensor([4]),
        features=torch.zeros(1, 4, 1),
        blocks=blocks,
        states=torch.tensor([[P, P, P, P]]).log(),
        draft_states=torch.tensor([[P, Q]]).log() if draft_states else None,
        accepted_weights=torch.tensor([[1.0, 0.0]]),
        rejected_weights=torch.tensor([[0.5, 0.25]]),
        denominator=torch.tensor(7.0),
    )


def test_batch_loss_divides_by_the_global_denominator():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(
        hidden, _batch(), _identity_heads(), StreamLosses(LossSettings("ce", 0.0), LossSettings("reverse_kl", 1.0))
    )
    accepted = math.log(4)
    rejected = 0.5 * kl(Q, P) + 0.25 * kl(P, Q)
    assert parts["accepted_loss"].item() == pytest.approx(accepted)
    assert parts["rejected_loss"].item() == pytest.approx(rejected, rel=1e-5)
    # The denominator is given, not the batch's own weight of 1.75.
    assert parts["loss"].item() == pytest.approx((accepted + rejected) / 7, rel=1e-5)
    assert parts["block_losses"].tolist() == pytest.approx([accepted + rejected], rel=1e-5)


def test_batch_loss_without_a_rejected_stream():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(
        hidden, _batch(False), _identity_heads(), StreamLosses(LossSettings("ce", 0.0), LossSettings("ce", 0.0))
    )
    assert parts["rejected_loss"].item() == 0
    assert parts["loss"].item() == pytest.approx(math.log(4) / 7)


def test_rejected_cross_entropy_reads_the_targets_argmax():
    hidden = torch.tensor([[Q, P]]).log()
    parts = batch_loss(
        hidden, _batch(), _identity_heads(), StreamLosses(LossSettings("ce", 0.0), LossSettings("ce", 0.0))
    )
    # Given the drafted prefix the target's tokens are 2 (from P) and 0 (from Q), not the drafted 0 and 1.
    assert parts["rejected_loss"].item() == pytest.approx(0.5 * math.log(4) + 0.25 * math.log(4), rel=1e-5)


def test_the_rejected_mixture_reads_the_targets_argmax_beside_its_distribution():
    hidden, losses = torch.tensor([[Q, P]]).log(), StreamLosses(LossSettings("ce", 0.0), LossSettings("ce_tv", 1.0))
    parts = batch_loss(hidden, _batch(), _identity_heads(), losses)
    # As above, 2 and 0; the two distributions share three quarters at both slots.
    assert parts["rejected_loss"].item() == pytest.approx(0.75 * (0.1 * math.log(4) + 1.8 * 0.25), rel=1e-5)


def test_hard_tokens_only_where_weighted():
    states = torch.tensor([[P, Q], [P, P]]).log()
    tokens = hard_tokens(states, torch.tensor([[1.0, 1.0], [0.0, 0.5]]), _identity_heads(), chunk_size=2)
    assert tokens.tolist() == [[2, 0], [0, 2]]


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


# -- a loss of the drafter's own -----------------------------------------------------------------------------------


def _own_loss(gain):
    """Reads all that it is given, and has a parameter."""

    def auxiliary(states, draft_logps, target_logps):
        overlap = torch.minimum(draft_logps, target_logps).exp().sum(-1)
        return {"loss": gain * (overlap + states.float().square().mean(-1)), "overlap": overlap}

    return auxiliary


@pytest.mark.parametrize("chunk_size", [1, 5, 256])
@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize(
    ("kind", "temperature"), [("ce", 0.0), ("k3", 0.7), ("forward_kl", 0.7), ("accepted_length", 0.7)]
)
def test_a_loss_of_the_drafters_own_in_chunks_equals_the_reference(kind, temperature, reduced, chunk_size):
    """Values, metrics and gradients; it is added behind what `accepted_length` multiplies up."""
    settings, results = LossSettings(kind, temperature), []
    weights = torch.tensor([[1.0, 0.5, 0.0], [0.3, 1.0, 0.2], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    tokens = torch.randint(11, (4, 3), generator=torch.Generator().manual_seed(1))
    for reference in (True, False):
        hidden, states, _, heads = _problem(reduced, slots=12)
        gain = torch.tensor(0.7, requires_grad=True)
        blocks = hidden.view(4, 3, -1), states.view(4, 3, -1)
        if reference:
            plain, none = stream_loss(*blocks, tokens, weights, heads, settings)
            assert none == {}
            target_logits = heads.target_logits(states)
            taught = tokens.flatten() if settings.reads_token else target_logits.argmax(-1)
            inside = torch.ones(12, dtype=torch.bool)
            if reduced:
                inside = (taught[:, None] == heads.vocab_map).any(-1)
                target_logits = target_logits[:, heads.vocab_map]
            draft_logps = heads.draft_logits(hidden).log_softmax(-1)
            found = _own_loss(gain)(hidden, draft_logps, (target_logits / (temperature or 1.0)).log_softmax(-1))
            found = {name: (values * inside).view(4, 3) * weights for name, values in found.items()}
            losses = plain + found["loss"].sum(-1)
            sums = {name: values.detach().sum() for name, values in found.items()}
        else:
            heads = replace(heads, auxiliary=_own_loss(gain), auxiliary_reads_target=True)
            losses, sums = stream_loss(*blocks, tokens, weights, heads, settings, chunk_size)
        losses.sum().backward()
        results.append((losses.detach(), sums, hidden.grad, heads.draft_weight.grad, gain.grad))
    assert results[0][1]["loss"] > 0
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_the_target_is_read_for_ones_own_loss_only_where_that_asks_for_it():
    seen = []

    def auxiliary(states, draft_logps, target_logps):
        seen.append(target_logps is not None)
        return {"loss": draft_logps.sum(-1)}

    for reads_target in (False, True):
        heads = replace(_identity_heads(), auxiliary=auxiliary, auxiliary_reads_target=reads_target)
        hidden = torch.tensor([[Q, P]]).log()
        batch_loss(hidden, _batch(), heads, StreamLosses(LossSettings("ce", 0.0), LossSettings("reverse_kl", 1.0)))
    assert seen == [False, True, True, True]
    frozen = replace(heads, draft_weight=torch.eye(3), target_weight=torch.eye(3))
    assert not uses_kernel(torch.device("cuda"), frozen, LossSettings("forward_kl", 1.0))
    assert uses_kernel(torch.device("cuda"), replace(frozen, auxiliary=None), LossSettings("forward_kl", 1.0))


def test_ones_own_loss_is_summed_over_both_streams_and_divided_as_they_are():
    def auxiliary(states, draft_logps, target_logps):
        return {"loss": torch.full_like(draft_logps[:, 0], 2.0), "rank": torch.ones_like(draft_logps[:, 0])}

    hidden, settings = (
        torch.tensor([[Q, P]]).log(),
        StreamLosses(LossSettings("ce", 0.0), LossSettings("reverse_kl", 1.0)),
    )
    plain = batch_loss(hidden, _batch(), _identity_heads(), settings)
    parts = batch_loss(hidden, _batch(), replace(_identity_heads(), auxiliary=auxiliary), settings)
    # Weights are 1 in the accepted stream, 0.5 and 0.25 in the rejected one; the denominator is 7.
    assert parts["auxiliary"] == {"loss": pytest.approx(3.5), "rank": pytest.approx(1.75)}
    assert parts["accepted_loss"].item() == pytest.approx(plain["accepted_loss"].item() + 2)
    assert parts["rejected_loss"].item() == pytest.approx(plain["rejected_loss"].item() + 1.5)
    assert parts["loss"].item() == pytest.approx(plain["loss"].item() + 0.5)


def test_with_no_slots_every_parameter_of_the_heads_has_a_gradient():
    gain = torch.tensor(0.7, requires_grad=True)
    hidden, states, tokens, heads = _problem(False, slots=12)
    heads = replace(heads, auxiliary=_own_loss(gain), auxiliary_reads_target=True)
    blocks = (part.view(4, 3, -1) for part in (hidden, states))
    losses, sums = stream_loss(*blocks, tokens.view(4, 3), torch.zeros(4, 3), heads, LossSettings("forward_kl", 1.0))
    losses.sum().backward()
    assert losses.tolist() == [0] * 4 and {name: float(value) for name, value in sums.items()} == {
        "loss": 0,
        "overlap": 0,
    }
    assert all(float(value.grad.abs().sum()) == 0 for value in (hidden, heads.draft_weight, gain))
