"""Targets and drafters of 16 bits, and autocast: what a float32 run of the same weights computes, to rounding."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import random_prompts, tiny_drafter, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from draft_opd_trl.core.target import Target
from draft_opd_trl.core.vocabulary import to_draft_ids
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings, StreamLosses
from draft_opd_trl.training.losses import Heads, batch_loss, draft_loss
from draft_opd_trl.training.streams import StreamSettings


LOSSES = StreamLosses(LossSettings("forward_kl", 1.0), LossSettings("reverse_kl", 1.0))
BF16 = torch.bfloat16
EXACT = (torch.float32, torch.float32, False)
# Of the target, of the drafter, and whether losses are computed under autocast.
ROUGH = {
    "bf16 target": (BF16, torch.float32, False),
    "autocast": (BF16, torch.float32, True),
    "both bf16": (BF16, BF16, False),
    "bf16 drafter, autocast": (torch.float32, BF16, True),
}


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
    return target, drafter, speculate(target, drafter, random_prompts(6), SpeculationSettings(12, []))


class Step:
    """A micro-step's models and batch, over blocks of the exact models', so that no proposal hangs on rounding."""

    def __init__(self, pair, target_dtype, drafter_dtype, autocast):
        target, drafter, rollout = pair
        self.target, self.autocast = Target(copy.deepcopy(target.model).to(target_dtype)), autocast
        drafter._target = None
        self.drafter = copy.deepcopy(drafter).to(drafter_dtype).bind(self.target)
        streams, on_policy = StreamSettings(rejected_weight=0.5), OnPolicySettings(num_anchors=6)
        maker = BatchMaker(self.target, self.drafter, streams, on_policy, seed=0)
        (self.batch,), _ = maker([rollout], step=0, lmbda=0.5, fresh=True)

    def inside(self):
        """Of both streams, whether slots can teach: the target's most likely token is of the draft vocabulary."""
        with torch.no_grad(), torch.autocast("cpu", BF16, enabled=self.autocast):
            logits = self.target.logits(torch.stack([self.batch.text_states, self.batch.draft_states]))
        likely, vocab_map = logits.argmax(-1), self.drafter.vocab_map
        return torch.ones_like(likely).bool() if vocab_map is None else to_draft_ids(likely, vocab_map)[1]

    def loss_and_gradients(self, kept):
        accepted, rejected = self.batch.accepted_weights * kept[0], self.batch.rejected_weights * kept[1]
        assert accepted.any() and rejected.any()
        batch = replace(self.batch, accepted_weights=accepted, rejected_weights=rejected)
        with torch.autocast("cpu", BF16, enabled=self.autocast):
            loss = draft_loss(self.drafter, self.target, batch, LOSSES)["loss"]
        loss.backward()
        gradients = [parameter.grad for parameter in self.drafter.parameters() if parameter.grad is not None]
        return loss.detach(), torch.cat([gradient.flatten().float() for gradient in gradients])


@pytest.mark.parametrize("dtypes", ROUGH.values(), ids=ROUGH)
def test_losses_and_gradients_are_float32_s_to_rounding(pair, dtypes):
    """But for slots whose most likely token rounding puts into a draft vocabulary or out of it: they are few."""
    exact, rough = Step(pair, *EXACT), Step(pair, *dtypes)
    kept = exact.inside() == rough.inside()
    assert (~kept).float().mean() < 0.05
    loss, gradients = exact.loss_and_gradients(kept)
    rough_loss, rough_gradients = rough.loss_and_gradients(kept)
    assert rough_loss.dtype == torch.float32  # divergences and their sums are, whatever made the logits
    assert rough_loss != loss  # 16 bits had a say
    torch.testing.assert_close(rough_loss, loss, rtol=5e-3, atol=0)
    assert (rough_gradients - gradients).norm() < 0.02 * gradients.norm()


def by_hand(step, hidden, inside):
    """Losses of blocks `(N,)` in float64, from the logits as the heads give them."""
    batch, vocab_map = step.batch, step.drafter.vocab_map
    draft = step.drafter.logits(hidden).double().log_softmax(-1)
    streams = [(batch.text_states, batch.accepted_weights), (batch.draft_states, batch.rejected_weights)]
    total = 0
    for index, (states, weights) in enumerate(streams):
        logits = step.target.logits(states).double()
        target = (logits if vocab_map is None else logits[..., vocab_map]).log_softmax(-1)
        over, under = (target, draft) if index == 0 else (draft, target)
        total = total + ((over.exp() * (over - under)).sum(-1) * inside[index] * weights).sum(-1)
    return total


@pytest.mark.parametrize("dtypes", [ROUGH["both bf16"], ROUGH["autocast"]], ids=["both bf16", "autocast"])
def test_divergences_of_16_bit_logits_are_not_rounded(pair, dtypes):
    step = Step(pair, *dtypes)
    heads = replace(Heads.of(step.drafter, step.target), auxiliary=None)
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=step.autocast):
        hidden = step.drafter.draft(step.batch.features, step.batch.tokens, step.batch.blocks)
        losses = batch_loss(hidden, step.batch, heads, LOSSES)["block_losses"]
        expected = by_hand(step, hidden, step.inside())
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)


def test_logits_of_a_16_bit_target_become_float32(pair):
    target, _, rollout = pair
    rough = Target(copy.deepcopy(target.model).to(BF16))
    features, states = rough.forward_text(rollout.tokens, (0,))
    assert features.dtype == states.dtype == BF16 and rough.logits(states).dtype == torch.float32


class WidenedFeatures(TorchDispatchMode):
    """Tensors at least as large as the features, made float32."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32 and result.numel() == self.size:
            self.found.append(function)
        return result


def test_autocast_reads_features_of_16_bits_as_they_are(pair):
    """At the paper's size their float32 copy takes 4.6 GiB."""
    step = Step(pair, *ROUGH["autocast"])
    features, blocks = step.batch.features, step.batch.blocks
    with WidenedFeatures(features.numel()) as widened, torch.autocast("cpu", BF16):
        step.drafter.draft(features, step.batch.tokens, blocks)
    assert features.dtype == BF16 and not widened.found
    with WidenedFeatures(features.numel()) as widened:
        step.drafter.draft(features, step.batch.tokens, blocks)
    assert widened.found or not step.drafter.target_layer_ids  # without autocast the weights' dtype it is
