"""Code run for its sizes, and the phases of a rehearsed step: what holds values, what has none, and what each asks of
the run's own code. Whether the sizes are a run's is in test_planning.py."""

import copy

import pytest
import torch
from conftest import tiny_drafter, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.shapes import SMALL, LiveBytes, Shapes, tensor_bytes
from draft_opd_trl.core.target import Target
from draft_opd_trl.training import rehearsal
from draft_opd_trl.training.rehearsal import Rehearsal


def is_fake(tensor):
    return isinstance(tensor, FakeTensor)


# -- counting -------------------------------------------------------------------------------------------------------


def test_bytes_are_counted_while_they_live_and_views_count_nothing():
    given = torch.zeros(100)
    with LiveBytes([given]) as live:
        first = given + 1
        view = first[:50]
        assert (live.live, live.peak) == (400, 400)
        second = view * 2
        assert (live.live, live.peak) == (600, 600)
        del first, second
        assert (live.live, live.peak) == (400, 600)  # the view keeps its base
        given.mul_(2)
        assert live.live == 400
        assert live.begin() == live.peak == 400


def test_memory_that_tensors_share_counts_once():
    whole = torch.zeros(10)
    assert tensor_bytes([whole, whole[:5], torch.zeros(3)]) == 52


def test_without_data_the_same_bytes_are_counted():
    def run():
        weight = torch.ones(40, 30, requires_grad=True)
        hidden = torch.zeros(7, 40) @ weight
        chosen = hidden[torch.arange(7) % 2 == 0]
        functional.cross_entropy(chosen, torch.zeros(4, dtype=torch.long)).backward()

    counts = []
    for mode in (LiveBytes(), Shapes()):
        with mode as live:
            run()
        counts.append(live.peak)
    assert counts[0] == counts[1] > 0


# -- what has values ------------------------------------------------------------------------------------------------


def test_a_copied_module_stays_under_its_mode():
    """PEFT copies the modules that it saves whole. PyTorch would copy the mode too, and crash some time later."""
    with Shapes() as shapes:
        copied = copy.deepcopy(nn.Linear(4, 4))
        assert copied.weight.fake_mode is shapes.fake
        assert copied(torch.ones(2, 4)).shape == (2, 4)


def test_whole_numbers_lead_the_code_and_weights_have_no_data():
    with Shapes():
        states = torch.zeros(4, 6)
        lengths = torch.tensor([2, 5, 0, 3])
        mask = torch.arange(6) < lengths[:, None]
        assert is_fake(states) and not is_fake(mask)
        assert mask.sum(1).tolist() == [2, 5, 0, 3]
        assert states[mask].shape == (10,)  # the very cells, not all
        states[mask] = 1.0
        assert [len(part) for part in states[mask].split(lengths.tolist())] == [2, 5, 0, 3]
        assert mask.nonzero().shape == (10, 2)
        weights = 0.5 ** torch.arange(3)
        assert weights.tolist() == [1.0, 0.5, 0.25]  # computed from whole numbers
        drawn = torch.rand(5, generator=torch.Generator().manual_seed(0))
        assert drawn.tolist() == torch.rand(5, generator=torch.Generator().manual_seed(0)).tolist()


def test_what_is_asked_of_numbers_without_data_has_one_answer():
    with Shapes():
        logits = nn.Linear(8, 20)(torch.zeros(3, 8))
        assert logits.argmax(-1).tolist() == [0, 0, 0]
        assert bool((logits > 0).all()) and bool((logits < 0).all())
        assert float(logits.detach().sum()) == 1.0
        assert torch.allclose(logits, logits + 1) and torch.equal(logits, logits + 1)
        assert not torch.equal(torch.arange(3), torch.arange(3) + 1)
        tokens = torch.full((3,), 7)
        tokens[torch.arange(2)] = logits.argmax(-1)[:2]
        assert tokens.tolist() == [0, 0, 7]
        kept = torch.tensor([1.0])
        kept += logits[0, :1].detach()
        assert kept.tolist() == [1.0]  # what was there stays


def test_masks_of_attention_cost_no_memory():
    with Shapes() as live:
        places = torch.arange(SMALL // 1024)
        mask = places[:, None] <= torch.arange(2048)
        assert is_fake(mask) and live.live >= mask.numel()
        assert torch.zeros(mask.shape)[mask].shape == (mask.numel(),)  # of what nobody knows, all


# -- the step -------------------------------------------------------------------------------------------------------


def settings(**options):
    defaults = {"per_device_train_batch_size": 2, "max_completion_length": 20, "rollout_source": "dataset"}
    return DraftOPDConfig("unused", **{**defaults, **options})


@pytest.fixture
def make(kind):
    target = Target(tiny_model("qwen3"))
    drafter = tiny_drafter(kind, target)
    return lambda args, **options: Rehearsal(target.model.config, drafter.config, args, 6, **options)


@pytest.mark.parametrize(
    ("options", "acceptance_length", "blocks"),
    [
        ({"rejected_weight": 1.0}, 1.0, 19),
        ({"rejected_weight": 1.0}, 2.0, 10),
        ({"rejected_weight": 1.0, "num_anchors": 4}, 1.0, 4),
        ({}, 1.0, 19),
        ({"lmbda": 0.0}, 1.0, 19),
        ({"lmbda": 0.0, "num_anchors": 4}, 1.0, 4),
    ],
)
def test_a_batch_has_the_most_blocks_that_a_text_can_have(make, options, acceptance_length, blocks):
    step = make(settings(**options), acceptance_length=acceptance_length)
    (batch,), _ = step.prepare()
    assert len(batch.blocks) == 2 * blocks
    assert batch.tokens.shape == (2, 26) and is_fake(batch.features)


def test_slots_teach_as_they_do_in_a_run(make):
    """Of an accepted run the text and the token behind it; of a rejected one what the target says of each slot."""
    (batch,), _ = make(settings(rejected_weight=1.0)).prepare()
    blocks = batch.blocks
    assert int(blocks.num_accepted.sum()) == 0
    assert int((batch.accepted_weights > 0).sum()) == len(blocks)
    assert int((batch.rejected_weights > 0).sum()) == int(blocks.num_valid.sum()) + _beyond_the_text(blocks)
    # Without the rejected stream, few blocks share out the whole text.
    (batch,), _ = make(settings(num_anchors=5)).prepare()
    num_draft_tokens = batch.blocks.num_draft_tokens
    taught = int((batch.accepted_weights > 0).sum())
    assert len(batch.blocks) == 2 * 5 and 2 * 15 <= taught <= 2 * min(19, 5 * num_draft_tokens)


def _beyond_the_text(blocks):
    """Rejected slots that stand behind the text's end, of blocks that hold an error."""
    return int((blocks.num_draft_tokens - blocks.num_valid)[blocks.has_error].sum())


def test_where_lambda_moves_both_sorts_of_batches_are_made(make):
    batches, _ = make(settings(lmbda=1.0, lmbda_end=0.0, rejected_weight=1.0)).prepare()
    assert [bool((batch.rejected_weights > 0).any()) for batch in batches] == [True, False]


def test_remembered_texts_come_on_top(make):
    args = settings(rejected_weight=1.0, replay_buffer_size=9, replay_ratio=1.5)
    (batch,), _ = make(args).prepare()
    assert len(batch.tokens) == 2 + 2 * 2  # a ratio of 1.5 may draw two for each


def test_the_phases_call_what_a_run_calls(make, monkeypatch):
    """A change there changes the plan: nothing is rehearsed from a copy."""
    called = []

    def listen(name):
        function = getattr(rehearsal, name)
        monkeypatch.setattr(
            rehearsal, name, lambda *args, **kwargs: (called.append(name), function(*args, **kwargs))[1]
        )

    for name in ("prefill", "propose", "verify", "commit", "draft_loss"):
        listen(name)
    made = rehearsal.BatchMaker.__call__
    monkeypatch.setattr(
        rehearsal.BatchMaker, "__call__", lambda *args, **kwargs: (called.append("batch"), made(*args, **kwargs))[1]
    )
    step = make(settings(rollout_source="speculation"))
    step.rollout()
    batches, _ = step.prepare()
    step.train(batches)
    assert called == ["prefill", "propose", "verify", "commit", "batch", "draft_loss"]


def test_texts_that_are_not_fresh_are_replayed_and_rejected_slots_scored(make):
    """Both take a pass of the target with its cache, which kept states save."""
    work = {}
    for source in ("speculation", "dataset"):
        _, parts = make(settings(rollout_source=source, rejected_weight=1.0)).prepare()
        work[source] = parts["the target's pass, replay and scoring"]
        assert ("kept verification states" in parts) == (source == "speculation")
    assert work["dataset"] > work["speculation"]


def test_gradients_of_earlier_micro_steps_are_there_while_later_ones_are_made(make):
    parts = {}
    for steps in (1, 3):
        step = make(settings(gradient_accumulation_steps=steps))
        batches, _ = step.prepare()
        parts[steps] = step.train(batches)
    assert parts[1]["gradients"] == parts[3]["gradients"] == tensor_bytes(step.trainable)
    waiting = "features and target states of the step"
    assert parts[3][waiting] == 3 * parts[1][waiting]
