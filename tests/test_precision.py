"""Targets and drafters of 16 bits, and autocast: what a float32 run of the same weights computes, to rounding."""

import copy

import pytest
import torch
from conftest import random_prompts, tiny_drafter, tiny_model

from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings, StreamLosses
from draft_opd_trl.training.losses import draft_loss
from draft_opd_trl.training.streams import StreamSettings


LOSSES = StreamLosses(LossSettings("forward_kl", 1.0), LossSettings("forward_kl", 1.0))
BF16 = torch.bfloat16


def rounded(module):
    """The module with the weights that bfloat16 leaves it, in float32."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(BF16))
    return module


@pytest.fixture(scope="module")
def pair(kind):
    """A target and a drafter of rounded weights, and texts; mild weights, so that rounding stays small."""
    target = Target(rounded(tiny_model("qwen3", initializer_range=0.1)))
    drafter = rounded(tiny_drafter(kind, target))
    return target, drafter, speculate(target, None, random_prompts(3), SpeculationSettings(12, []))


def loss_and_gradients(pair, target_dtype, drafter_dtype, autocast):
    target, drafter, rollout = pair
    target = Target(copy.deepcopy(target.model).to(target_dtype))
    drafter._target = None
    drafter = copy.deepcopy(drafter).to(drafter_dtype).bind(target)
    maker = BatchMaker(target, drafter, StreamSettings(), OnPolicySettings(num_anchors=4), seed=0)
    # The text's own blocks: nothing hangs on which of two near logits is the larger.
    (batch,), _ = maker([rollout], step=0, lmbda=0.0)
    with torch.autocast("cpu", BF16, enabled=autocast):
        loss = draft_loss(drafter, target, batch, LOSSES)["loss"]
    loss.backward()
    parts = [parameter.grad.flatten().float() for parameter in drafter.parameters() if parameter.grad is not None]
    return loss.detach(), torch.cat(parts)


@pytest.mark.parametrize(
    ("target_dtype", "drafter_dtype", "autocast"),
    [(BF16, torch.float32, False), (BF16, torch.float32, True), (BF16, BF16, False), (torch.float32, BF16, True)],
    ids=["bf16 target", "autocast", "both bf16", "bf16 drafter, autocast"],
)
def test_losses_and_gradients_are_float32_s_to_rounding(pair, target_dtype, drafter_dtype, autocast):
    if pair[1].vocab_map is not None:
        pytest.skip("which slots teach hangs on the target's argmax, which rounding may flip")
    loss, gradients = loss_and_gradients(pair, torch.float32, torch.float32, False)
    rough, rough_gradients = loss_and_gradients(pair, target_dtype, drafter_dtype, autocast)
    assert rough.dtype == torch.float32  # divergences and their sums are, whatever made the logits
    assert rough != loss  # 16 bits had a say
    torch.testing.assert_close(rough, loss, rtol=2e-2, atol=0)
    assert (rough_gradients - gradients).norm() < 0.1 * gradients.norm()


def test_logits_of_a_16_bit_target_become_float32(pair):
    target, _, rollout = pair
    rough = Target(copy.deepcopy(target.model).to(BF16))
    features, states = rough.forward_text(rollout.tokens, (0,))
    assert features.dtype == states.dtype == BF16 and rough.logits(states).dtype == torch.float32
