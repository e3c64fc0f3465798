"""The phases of a rehearsed step, and what each asks of the run's own code. Whether their sizes are a run's is in
test_planning.py."""

import pytest
from conftest import tiny_drafter, tiny_model
from torch._subclasses.fake_tensor import FakeTensor

from draft_opd_trl import DraftOPDConfig
from draft_opd_trl.core.shapes import tensor_bytes
from draft_opd_trl.core.target import Target
from draft_opd_trl.training import rehearsal
from draft_opd_trl.training.rehearsal import Rehearsal


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
    assert batch.tokens.shape == (2, 26) and isinstance(batch.features, FakeTensor)


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
