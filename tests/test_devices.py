"""A step on a device that is not the CPU: no tensor or generator of the CPU slips in, and the host waits seldom."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, random_prompts, tiny_drafter
from peft import LoraConfig
from pretend_device import DEVICE, PretendDevice, move, refused

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.evaluation.by_replay import measure_by_replay
from draft_opd_trl.evaluation.measure import measure_acceptance
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings, StreamLosses
from draft_opd_trl.training.error_buffer import ErrorBuffer
from draft_opd_trl.training.feed import BatchFeed
from draft_opd_trl.training.loading import add_adapter
from draft_opd_trl.training.losses import draft_loss
from draft_opd_trl.training.streams import StreamSettings


LENGTH = 5
GREEDY = SpeculationSettings(LENGTH, [], batch_size=3, keep_states=True)
DRAWN = SpeculationSettings(LENGTH, [], SamplingParams(1.0, top_k=20, top_p=0.9), sample_proposals=True, batch_size=3)
LOSSES = StreamLosses(LossSettings("forward_kl", 1.0), LossSettings("reverse_kl", 1.0))
PROMPTS = random_prompts(4, seed=31)


def moved(target, kind, peft_config=None):
    """The models there, and what is trained."""
    drafter = tiny_drafter(kind, target)
    drafter._target = None
    model = move(drafter if peft_config is None else add_adapter(drafter, peft_config))
    target = Target(move(copy.deepcopy(target.model)))
    return target, drafter.bind(target), model


def step(target, drafter, model, rollouts, fresh=False, proposals=None, optimizer=True):
    """An optimizer step of two micro-steps that remembers texts and draws remembered ones; its losses."""
    streams, on_policy = StreamSettings(rejected_weight=0.5), OnPolicySettings(num_anchors=6, replay_ratio=1.0)
    buffer = ErrorBuffer(9, by_loss=True)
    maker = BatchMaker(target, drafter, streams, on_policy, 0, buffer, proposals)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for index in range(2):  # the second draws what the first has remembered
        batches, _ = maker(rollouts, index, 0.5 if index else 1.0, fresh=fresh and not index)
        for batch in batches:
            parts = draft_loss(drafter, target, batch, LOSSES)
            buffer.note(batch.tokens, batch.lengths, batch.blocks, parts["block_losses"])
            parts["loss"].backward()
            losses.append(parts["loss"].detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.step()
        steps.zero_grad()
    return losses


def halves(rollout):
    return [rollout.part(0, 2), rollout.part(2, 4)]


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_speculation_waits_once_a_round(qwen_target, kind, settings):
    here = speculate(qwen_target, tiny_drafter(kind, qwen_target), PROMPTS, settings, seeds=range(4))
    rounds = []
    with PretendDevice() as device:
        target, drafter, _ = moved(qwen_target, kind)
        device.waits.clear()
        rollout = speculate(target, drafter, PROMPTS, settings, seeds=range(4), on_round=lambda *at: rounds.append(at))
        waits = dict(device.waits)
        assert rollout.tokens.device == DEVICE and torch.equal(rollout.tokens.cpu(), here.tokens)
        assert torch.equal(rollout.blocks.draft_tokens.cpu(), here.blocks.draft_tokens)
    assert waits.pop("speculation.py:note") == len(rounds) > len(PROMPTS)
    assert waits.pop("speculation.py:_record") <= 2 * len(PROMPTS)  # where a lane was filled or freed
    assert waits.pop("speculation.py:fill") <= 4 * len(PROMPTS)
    assert sum(waits.values()) <= 4, waits  # once: stop tokens, seeds, and what was written


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_training_step_is_the_cpu_s(qwen_target, kind, settings):
    """Losses after an update too, so gradients are; backward pass and optimizer never wait, losses once a stream."""
    proposals = settings.sampling if settings.sample_proposals else None
    drafter = tiny_drafter(kind, qwen_target)
    rollout = speculate(qwen_target, drafter, PROMPTS, settings, seeds=range(4))
    here = step(qwen_target, drafter, drafter, halves(rollout), False, proposals)
    with PretendDevice() as device:
        target, drafter, model = moved(qwen_target, kind)
        rollouts = halves(rollout.to(DEVICE))
        device.waits.clear()
        there = step(target, drafter, model, rollouts, False, proposals)
        waits = dict(device.waits)
        there = [loss.cpu() for loss in there]
    torch.testing.assert_close(there, here)
    assert all(".py:" in place for place in waits), waits
    assert waits["losses.py:stream_loss"] == 2 * len(there)


def test_an_adapter_is_trained_there(qwen_target, kind):
    config = LoraConfig(r=2, target_modules="all-linear")
    with PretendDevice():
        target, drafter, model = moved(qwen_target, kind, config)
        rollout = speculate(target, drafter, PROMPTS, GREEDY)
        assert all(loss.isfinite() for loss in step(target, drafter, model, halves(rollout), fresh=True))


def test_both_ways_of_evaluation_run_there(qwen_target, kind):
    with PretendDevice():
        target, drafter, _ = moved(qwen_target, kind)
        decoded = measure_acceptance(target, drafter, PROMPTS, GREEDY)
        replayed = measure_by_replay(target, drafter, PROMPTS, GREEDY, seeds=range(4))
        assert decoded.accepted == replayed.accepted
        measure_by_replay(target, drafter, PROMPTS, DRAWN, seeds=range(4))


def test_a_run_goes_on_there(qwen_target):
    """What a checkpoint remembers of texts lies on the CPU, and goes back to where the run is."""
    with PretendDevice():
        target, drafter, _ = moved(qwen_target, KINDS[0])
        accelerator = SimpleNamespace(device=DEVICE, num_processes=1, reduce=lambda value, reduction: value)
        maker = BatchMaker(target, drafter, StreamSettings(), OnPolicySettings(), 0)

        def feed():
            return BatchFeed(lambda rows: speculate(target, drafter, rows, GREEDY), maker, accelerator, 3, 4, 2)

        first = feed()
        first.next(PROMPTS, 0, 1.0), first.next(PROMPTS, 0, 1.0)
        state = first.state_dict()
        assert all(part.device.type == "cpu" for texts in state["rollouts"] for part in texts.values())
        again = feed()
        again.load_state_dict(state)
        assert torch.equal(again.rollouts[0].tokens, first.rollouts[0].tokens)
        assert again.rollouts[0].tokens.device == DEVICE


# -- that it would be seen ------------------------------------------------------------------------------------------


def test_planted_faults_are_found(qwen_target, monkeypatch):
    both, generator = "tensors on both devices", "a generator of the CPU"
    with PretendDevice() as device:
        there = torch.arange(4, device=DEVICE)
        with refused(both):
            there + torch.ones(4)
        with refused(both):
            there[torch.tensor([0])]
        with refused(both):
            torch.ones(4)[there]
        with refused(generator):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        with refused(generator):
            torch.multinomial(there.float(), 1, generator=torch.Generator())
        assert not device.waits
        there[there > 1], there.tolist(), int(there[0]), bool((there > 0).any()), there.nonzero(), there.cpu()
        assert sum(device.waits.values()) == 6

        # A mask, made where the default is.
        target, drafter, _ = moved(qwen_target, KINDS[0])
        arange = torch.arange
        monkeypatch.setattr(torch, "arange", lambda *args, device=None, **options: arange(*args, **options))
        with refused(both):
            speculate(target, drafter, PROMPTS, GREEDY)
