"""A step on a device that is not the CPU: no tensor or generator of the CPU slips in, and the host waits seldom."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, random_prompts, tiny_drafter
from peft import LoraConfig
from pretend_device import DEVICE, PretendDevice, move, refused

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.core.target import Target
from draft_opd_trl.decoding import speculation
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
# Waits of the host, by function, in the four micro-steps of `step`, two of which draw two remembered texts each: as
# measured, but for those that hang on how long chains of blocks are. A drafter may wait once a micro-step.
STEP_WAITS = {
    "batching.py:_coupling": 4,
    "batching.py:_unpadded": 16,
    "block_choice.py:choose_in_each_text": 8,
    "block_choice.py:random_places": 12,
    "error_buffer.py:add": 20,
    "error_buffer.py:draw": 8,
    "error_buffer.py:note": 20,
    "losses.py:stream_loss": 8,
    "packing.py:pack_by_text": 28,
    "records.py:from_ids": 12,
    "records.py:select": 4,
    "replay_counts.py:count_outside": 8,
    "replay_counts.py:count_taught": 4,
    "replay_counts.py:count_verification": 24,
    "target.py:score_blocks": 4,
}


def moved(target, kind, peft_config=None):
    """The models there, and what is trained."""
    drafter = tiny_drafter(kind, target)
    drafter._target = None
    model = move(drafter if peft_config is None else add_adapter(drafter, peft_config))
    target = Target(move(copy.deepcopy(target.model)))
    return target, drafter.bind(target), model


def step(target, drafter, model, rollouts, fresh=False, proposals=None, steps=2, rejected=0.5):
    """Optimizer steps, a micro-step a rollout; the first remembers texts, the second draws these. Their losses."""
    streams, on_policy = StreamSettings(rejected_weight=rejected), OnPolicySettings(num_anchors=6, replay_ratio=1.0)
    buffer = ErrorBuffer(9, by_loss=True)
    maker = BatchMaker(target, drafter, streams, on_policy, 0, buffer, proposals)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for index in range(steps):
        batches, _ = maker(rollouts, index, 0.5 if index else 1.0, fresh=fresh and not index)
        for batch in batches:
            parts = draft_loss(drafter, target, batch, LOSSES)
            buffer.note(batch.tokens, batch.lengths, batch.blocks, parts["block_losses"])
            parts["loss"].backward()
            losses.append(parts["loss"].detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def halves(rollout):
    return [rollout.part(0, 2), rollout.part(2, 4)]


def check_waits_of_rounds(waits, rounds):
    """Once a round; what else waits does so when a text starts or ends, or once."""
    waits = dict(waits)
    assert waits.pop("speculation.py:note") == rounds > len(PROMPTS)
    assert waits.pop("speculation.py:_record") <= 2 * len(PROMPTS)  # where a lane was filled or freed
    assert waits.pop("speculation.py:fill") <= 4 * 2  # at the start, and when a lane was free for the fourth
    assert waits == {"speculation.py:__init__": 2, "speculation.py:rollout": 2}


def check_waits_of_steps(waits, kind, num_draft_tokens, rejected):
    """[`STEP_WAITS`]; the backward pass and the optimizer never wait."""
    rounds, replays = waits["chains.py:next_anchors"], waits["chains.py:blocks"] // 4
    bounds = STEP_WAITS | {
        "batching.py:_replayed": 2 * replays,
        "chains.py:blocks": 4 * replays,
        "chains.py:next_anchors": rounds,
        "chains.py:note": rounds,
        "chains.py:running": rounds + replays,
        "replay.py:draft_at": rounds + 2,
        f"{kind}.py:draft": 4,
    }
    if not rejected:
        bounds |= {
            # Once, and at each run of 1, 1, 2, 4, … slots that is read.
            "replay.py:read": (rounds + 2) * (2 + math.ceil(math.log2(num_draft_tokens))),
            "target.py:_run_decoder": 4,  # without a cache transformers looks whether positions are of packed texts
        }
    assert replays <= 4
    assert {place: count for place, count in waits.items() if count > bounds.get(place, 0)} == {}


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_speculation_waits_once_a_round(qwen_target, kind, settings):
    here = speculate(qwen_target, tiny_drafter(kind, qwen_target), PROMPTS, settings, seeds=range(4))
    rounds = []
    with PretendDevice() as device:
        target, drafter, _ = moved(qwen_target, kind)
        device.waits.clear()
        rollout = speculate(target, drafter, PROMPTS, settings, seeds=range(4), on_round=lambda *at: rounds.append(at))
        check_waits_of_rounds(device.waits, len(rounds))
        assert rollout.tokens.device == DEVICE and torch.equal(rollout.tokens.cpu(), here.tokens)
        assert torch.equal(rollout.blocks.draft_tokens.cpu(), here.blocks.draft_tokens)


@pytest.mark.parametrize("rejected", [0.5, 0.0], ids=["two streams", "accepted stream"])
@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_training_step_is_the_cpu_s(qwen_target, kind, settings, rejected):
    """Losses after an update too, so gradients are; and the host waits where it is known to, and no more often."""
    proposals = settings.sampling if settings.sample_proposals else None
    drafter = tiny_drafter(kind, qwen_target)
    rollout = speculate(qwen_target, drafter, PROMPTS, settings, seeds=range(4))
    here = step(qwen_target, drafter, drafter, halves(rollout), False, proposals, rejected=rejected)
    with PretendDevice() as device:
        target, drafter, model = moved(qwen_target, kind)
        rollouts = halves(rollout.to(DEVICE))
        device.waits.clear()
        there = step(target, drafter, model, rollouts, False, proposals, rejected=rejected)
        check_waits_of_steps(device.waits, kind, drafter.num_draft_tokens, rejected)
        there = [loss.cpu() for loss in there]
    torch.testing.assert_close(there, here)


def test_an_adapter_is_trained_there(qwen_target, kind):
    config = LoraConfig(r=2, target_modules="all-linear")
    with PretendDevice():
        target, drafter, model = moved(qwen_target, kind, config)
        rollout = speculate(target, drafter, PROMPTS[:2], GREEDY)
        losses = step(target, drafter, model, [rollout], fresh=True, steps=1)
        assert all(loss.isfinite() for loss in losses)


def test_both_ways_of_evaluation_run_there(qwen_target, kind):
    with PretendDevice():
        target, drafter, _ = moved(qwen_target, kind)
        decoded = measure_acceptance(target, drafter, PROMPTS[:2], GREEDY)
        replayed = measure_by_replay(target, drafter, PROMPTS[:2], GREEDY, seeds=range(2))
        assert decoded.accepted == replayed.accepted
        measure_by_replay(target, drafter, PROMPTS[:2], DRAWN, seeds=range(2))


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

        # Rounds that ask once more.
        target, drafter, _ = moved(qwen_target, KINDS[0])
        device.waits.clear()
        rounds, commit = [], speculation.commit
        with monkeypatch.context() as patched, pytest.raises(AssertionError):
            patched.setattr(speculation, "commit", lambda *args: (ended := commit(*args), bool(ended.any()))[0])
            speculate(target, drafter, PROMPTS, GREEDY, on_round=lambda *at: rounds.append(at))
            check_waits_of_rounds(device.waits, len(rounds))

        # A mask, made where the default is.
        arange = torch.arange
        monkeypatch.setattr(torch, "arange", lambda *args, device=None, **options: arange(*args, **options))
        with refused(both):
            speculate(target, drafter, PROMPTS, GREEDY)
