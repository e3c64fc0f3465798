"""From texts to training batches: stream weights by hand, the choice of blocks, and independence of batch layout."""

import pytest
import torch
from conftest import random_prompts, tiny_drafter

from draft_opd_trl.batching import (
    BatchMaker,
    ReplayMetrics,
    StreamSettings,
    choose_blocks,
    make_batch,
    random_anchors,
    row_generator,
    stream_weights,
)
from draft_opd_trl.losses import Heads, LossSettings, batch_loss
from draft_opd_trl.records import DraftBlocks, Rollout
from draft_opd_trl.replay import ErrorBuffer, draft_at, grid_of, read_text, replay_text, text_blocks
from draft_opd_trl.sampling_params import SamplingParams
from draft_opd_trl.speculation import SpeculationSettings, speculate


def _block(num_accepted, num_valid, num_draft_tokens=4):
    return DraftBlocks(*(torch.tensor(v) for v in ([0], [1], [[0] * num_draft_tokens], [num_accepted], [num_valid])))


def _weights(num_accepted, num_valid, on_policy=True, **streams):
    accepted, rejected = stream_weights(
        _block(num_accepted, num_valid), torch.tensor([on_policy]), StreamSettings(**streams)
    )
    return accepted[0].tolist(), rejected[0].tolist()


# -- weights, K = 4 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_accepted", "num_valid", "accepted", "rejected"),
    [
        # The accepted stream goes up to and including the next anchor; the rejected one starts at the first error.
        (0, 4, [1, 0, 0, 0], [2, 1, 0.5, 0.25]),
        (2, 4, [1, 1, 1, 0], [0, 0, 2, 1]),
        (3, 4, [1, 1, 1, 1], [0, 0, 0, 2]),
        (4, 4, [1, 1, 1, 1], [0, 0, 0, 0]),
        # The text ends after two slots: nothing beyond is text, and without an error nothing was rejected.
        (2, 2, [1, 1, 0, 0], [0, 0, 0, 0]),
        (1, 2, [1, 1, 0, 0], [0, 2, 1, 0.5]),
        (0, 1, [1, 0, 0, 0], [2, 1, 0.5, 0.25]),
        (0, 0, [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_stream_weights_by_hand(num_accepted, num_valid, accepted, rejected):
    got = _weights(num_accepted, num_valid, rejected_weight=2.0, rejected_decay=0.5)
    assert got == (accepted, rejected)


def test_accepted_weight_and_decay():
    accepted, rejected = _weights(2, 4, accepted_weight=3.0, accepted_decay=0.5)
    assert accepted == [3, 1.5, 0.75, 0]
    assert rejected == [0, 0, 0, 0]


def test_whole_blocks_go_on_behind_the_error():
    assert _weights(1, 3, whole_blocks=True) == ([1, 1, 1, 0], [0, 0, 0, 0])


def test_without_decay_only_the_first_rejected_slot_is_left():
    assert _weights(1, 4, rejected_weight=0.5, rejected_decay=0.0)[1] == [0, 0.5, 0, 0]


def test_text_blocks_take_the_sft_decay_and_no_rejected_stream():
    accepted, rejected = _weights(
        3, 3, on_policy=False, accepted_weight=3.0, accepted_decay=0.1, sft_decay=0.5, rejected_weight=1.0
    )
    assert accepted == [1, 0.5, 0.25, 0]
    assert rejected == [0, 0, 0, 0]


def test_both_kinds_of_blocks_in_one_batch():
    both = DraftBlocks.cat([_block(4, 4), _block(1, 4)])
    accepted, rejected = stream_weights(
        both, torch.tensor([False, True]), StreamSettings(rejected_weight=1.0, rejected_decay=0.5, sft_decay=0.5)
    )
    assert accepted.tolist() == [[1, 0.5, 0.25, 0.125], [1, 1, 0, 0]]
    assert rejected.tolist() == [[0, 0, 0, 0], [0, 1, 0.5, 0.25]]


# -- which blocks --------------------------------------------------------------------------------------------------


def test_random_anchors_lie_in_the_completion_and_differ():
    for seed in range(20):
        anchors = random_anchors(12, 3, 5, torch.Generator().manual_seed(seed))
        # The completion is positions 3 … 11; the last one has nothing after it.
        assert anchors.min() >= 3 and anchors.max() <= 10
        assert len(set(anchors.tolist())) == 5 and anchors.tolist() == sorted(anchors.tolist())


def test_random_anchors_take_all_there_are_and_reach_both_ends():
    assert random_anchors(12, 3, 99, torch.Generator().manual_seed(0)).tolist() == list(range(3, 11))
    assert random_anchors(4, 3, 99, torch.Generator().manual_seed(0)).tolist() == []


def _verdicts(accepted):
    count = len(accepted)
    zeros = torch.zeros(count, dtype=torch.long)
    return DraftBlocks(
        zeros, torch.arange(count), zeros[:, None].expand(-1, 2), torch.tensor(accepted), torch.full((count,), 2)
    )


def test_choose_blocks_takes_errors_first():
    blocks = _verdicts([2, 0, 2, 1, 2, 2])
    for seed in range(10):
        chosen = choose_blocks(blocks, 3, torch.Generator().manual_seed(seed)).tolist()
        assert {1, 3} < set(chosen) and chosen == sorted(chosen)
        assert set(choose_blocks(blocks, 1, torch.Generator().manual_seed(seed)).tolist()) <= {1, 3}
    assert choose_blocks(blocks, 6, torch.Generator()).tolist() == [0, 1, 2, 3, 4, 5]


def test_choose_blocks_is_deterministic_and_varied():
    blocks = _verdicts([0] * 12)
    picks = [choose_blocks(blocks, 4, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1, 2)]
    assert picks[0] == picks[1]
    assert len({tuple(pick) for pick in picks}) == 3


def test_row_generator_depends_on_seed_step_and_text_alone():
    tokens = torch.tensor([1, 2, 3])
    first = torch.rand(2, generator=row_generator(0, 5, tokens))
    assert torch.equal(first, torch.rand(2, generator=row_generator(0, 5, tokens.clone())))
    for other in (row_generator(1, 5, tokens), row_generator(0, 6, tokens), row_generator(0, 5, tokens[:2])):
        assert not torch.equal(first, torch.rand(2, generator=other))


# -- batches -------------------------------------------------------------------------------------------------------

STREAMS = StreamSettings(rejected_weight=0.5, rejected_decay=0.5, sft_decay=0.7)
HARD = LossSettings("ce", 0.0)
SOFT = LossSettings("reverse_kl", 1.0)


@pytest.fixture(scope="module")
def rollout(qwen_target, qwen_drafter, prompts):
    texts = [*random_prompts(5, seed=31), *prompts[:3]]
    return speculate(qwen_target, qwen_drafter, texts, SpeculationSettings(24, [], keep_states=True))


def _losses(target, drafter, batches):
    total = sum(batch.denominator for batch in batches)
    heads = Heads.of(drafter, target)
    sums = 0.0
    for batch in batches:
        batch.denominator = total
        hidden = drafter.draft(batch.features, batch.tokens, batch.blocks)
        sums = sums + batch_loss(hidden, batch, heads, HARD, SOFT)["loss"]
    return sums


def _union(rollouts, batches):
    """Every supervised block by its text and anchor, whatever batch it lies in."""
    found = set()
    for texts, batch in zip(rollouts, batches, strict=True):
        for row, anchor, tokens in zip(
            batch.blocks.texts.tolist(), batch.blocks.anchors.tolist(), batch.blocks.draft_tokens.tolist(), strict=True
        ):
            text = tuple(texts.tokens[row, : texts.lengths[row]].tolist())
            found.add((text, anchor, tuple(tokens)))
    return found


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("fresh", "proposals"),
    [(False, None), (False, SamplingParams(1.0)), (True, None)],
    ids=["replayed", "replayed-drawn", "fresh"],
)
def test_draws_do_not_depend_on_the_batch_layout(qwen_target, qwen_drafter, rollout, lmbda, fresh, proposals):
    """Invariant 6: eight rows at once are two batches of four."""
    whole, halves = [rollout], [rollout.part(0, 4), rollout.part(4, 8)]
    results = []
    for layout in (whole, halves):
        maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, lmbda, num_anchors=5, seed=3, proposals=proposals)
        batches, metrics = maker(layout, step=2, fresh=fresh)
        denominator = sum(batch.denominator for batch in batches).item()
        counts = (metrics.committed, metrics.verifications, metrics.errors, metrics.blocks, metrics.supervised)
        results.append((_union(layout, batches), denominator, counts, metrics.accepted_by_slot))
        with torch.no_grad():
            results[-1] += (_losses(qwen_target, qwen_drafter, batches).item(),)
    assert results[0][0] == results[1][0] and len(results[0][0]) >= 24
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert results[0][2:4] == results[1][2:4]
    assert results[0][4] == pytest.approx(results[1][4], rel=1e-5)


def test_gradients_do_not_depend_on_the_batch_layout(qwen_target, kind, rollout):
    drafter = tiny_drafter(kind, qwen_target)
    gradients = []
    for layout in ([rollout], [rollout.part(0, 4), rollout.part(4, 8)]):
        batches, _ = BatchMaker(qwen_target, drafter, STREAMS, 0.5, num_anchors=5)(layout, step=0)
        drafter.zero_grad()
        _losses(qwen_target, drafter, batches).backward()
        gradients.append([parameter.grad.clone() for parameter in drafter.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_lmbda_decides_the_kind_of_block(qwen_target, qwen_drafter, rollout):
    for lmbda in (0.0, 1.0):
        maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, lmbda, num_anchors=6)
        (batch,), metrics = maker([rollout], step=0)
        if lmbda == 0:
            assert not batch.blocks.has_error.any() and batch.rejected_weights.sum() == 0
            assert torch.bincount(batch.blocks.texts).tolist() == [6] * 8
            assert metrics.verifications == 0 and metrics.figures()["acceptance/length"] == (0, 0)
        else:
            assert batch.blocks.has_error.any() and batch.rejected_weights.sum() > 0
            assert metrics.verifications == len(rollout.blocks)
    mixed, metrics = BatchMaker(qwen_target, qwen_drafter, STREAMS, 0.5, num_anchors=6)([rollout], step=0)
    on_policy = set(mixed[0].blocks.texts[mixed[0].rejected_weights.sum(1) > 0].tolist())
    assert 0 < len(on_policy) < 8


def test_random_anchors_with_the_drafters_own_proposals(qwen_target, qwen_drafter, rollout):
    maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0, num_anchors=6, anchors="random")
    (batch,), metrics = maker([rollout], step=0, fresh=True)
    assert torch.bincount(batch.blocks.texts).tolist() == [6] * 8
    exposed = set(zip(rollout.blocks.texts.tolist(), rollout.blocks.anchors.tolist(), strict=True))
    assert not exposed.issuperset(zip(batch.blocks.texts.tolist(), batch.blocks.anchors.tolist(), strict=True))
    state = read_text(qwen_drafter, rollout, batch.features)
    again = draft_at(qwen_drafter, state, rollout, *grid_of(batch.blocks.texts, batch.blocks.anchors, 8))
    assert torch.equal(batch.blocks.draft_tokens, again.draft_tokens)
    assert torch.equal(batch.blocks.num_accepted, again.num_accepted)
    # They are no verification of the text, so they count in no acceptance.
    assert metrics.verifications == 0


def test_sft_and_opd_see_the_same_text(qwen_target, qwen_drafter, rollout):
    """What an SFT block teaches at a slot is the text there."""
    (batch,), _ = BatchMaker(qwen_target, qwen_drafter, STREAMS, 0.0, num_anchors=6)([rollout], step=0)
    expected = text_blocks(rollout, batch.blocks.texts, batch.blocks.anchors, qwen_drafter.num_draft_tokens)
    assert torch.equal(batch.labels, expected.draft_tokens)
    assert torch.equal(batch.blocks.num_accepted, expected.num_valid)
    inside = torch.arange(qwen_drafter.num_draft_tokens) < expected.num_valid[:, None]
    decay = 0.7 ** torch.arange(qwen_drafter.num_draft_tokens)
    torch.testing.assert_close(batch.accepted_weights, inside * decay)


def test_text_states_predict_their_slots(qwen_target, qwen_drafter, rollout):
    """Greedy text: the state that predicts a slot has the slot's label as its argmax."""
    (batch,), _ = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0)([rollout], step=0)
    inside = torch.arange(qwen_drafter.num_draft_tokens) < batch.blocks.num_valid[:, None]
    said = qwen_target.logits(batch.text_states).argmax(-1)
    assert torch.equal(said[inside], batch.labels[inside])


def test_kept_states_equal_scored_ones(qwen_target, qwen_drafter, rollout):
    batches = []
    for texts in (rollout, Rollout(rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.blocks)):
        (batch,), _ = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0, num_anchors=5)([texts], step=0, fresh=True)
        batches.append(batch)
    kept, scored = batches
    assert torch.equal(kept.blocks.anchors, scored.blocks.anchors)
    chosen = kept.rejected_weights > 0
    assert chosen.sum() > 20
    torch.testing.assert_close(kept.draft_states[chosen], scored.draft_states[chosen], rtol=1e-4, atol=1e-4)


def test_kept_states_follow_their_blocks_in_a_mixed_batch(qwen_target, qwen_drafter, rollout):
    maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, 0.5, num_anchors=5)
    (kept,), _ = maker([rollout], step=0, fresh=True)
    (scored,), _ = maker([rollout], step=0, fresh=False)
    assert torch.equal(kept.blocks.anchors, scored.blocks.anchors)
    chosen = kept.rejected_weights > 0
    torch.testing.assert_close(kept.draft_states[chosen], scored.draft_states[chosen], rtol=1e-4, atol=1e-4)


def test_nothing_is_scored_without_a_rejected_stream(qwen_target, qwen_drafter, rollout, monkeypatch):
    monkeypatch.setattr(qwen_target, "score_blocks", None)
    (batch,), _ = BatchMaker(qwen_target, qwen_drafter, StreamSettings(), 1.0)([rollout], step=0)
    assert batch.draft_states is None
    assert batch.denominator == batch.accepted_weights.sum()


def test_draft_states_by_slow_scoring(qwen_target, qwen_drafter, rollout):
    """The state that judges a rejected slot has read the text up to the anchor and the drafted tokens after it."""
    (batch,), _ = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0, num_anchors=2)([rollout], step=0)
    checked = 0
    for index in batch.blocks.has_error.nonzero()[:6, 0].tolist():
        row, anchor = int(batch.blocks.texts[index]), int(batch.blocks.anchors[index])
        text = torch.cat([rollout.tokens[row, : anchor + 1], batch.blocks.draft_tokens[index, :-1]])[None]
        states = qwen_target.forward_text(text, ())[1][0, anchor:]
        chosen = batch.rejected_weights[index] > 0
        torch.testing.assert_close(batch.draft_states[index, chosen], states[chosen], rtol=1e-4, atol=1e-4)
        checked += int(chosen.sum())
    assert checked > 8


def test_make_batch_denominator_is_its_own_weight(qwen_target, qwen_drafter, rollout):
    features, states = qwen_target.forward_text(rollout.tokens, qwen_drafter.target_layer_ids)
    blocks = replay_text(qwen_drafter, rollout, features)
    on_policy = torch.ones(len(blocks), dtype=torch.bool)
    batch = make_batch(
        qwen_target, rollout, blocks, on_policy, STREAMS, features, states, block_states=rollout.block_states
    )
    assert batch.denominator == batch.accepted_weights.sum() + batch.rejected_weights.sum()


def test_drawn_error_positions_are_drafted_afresh(qwen_target, qwen_drafter, kind, rollout):
    buffer = ErrorBuffer(100)
    stale = replay_text(
        tiny_drafter(kind, qwen_target, seed=5),
        rollout,
        qwen_target.forward_text(rollout.tokens, qwen_drafter.target_layer_ids)[0],
    )
    buffer.add(rollout, stale)
    old = [(tokens, anchor) for tokens, entry in buffer.entries.items() for anchor in entry.losses]
    new = rollout.part(0, 2)
    maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0, num_anchors=4, buffer=buffer, replay_ratio=1.0)
    (batch,), metrics = maker([new], step=0, fresh=True)
    assert len(batch.tokens) == 4, "two new texts and as many remembered ones"
    drawn = batch.blocks.select(batch.blocks.texts >= 2)
    assert len(drawn) > 4
    lengths = (batch.tokens[2:] != 0).sum(1)
    for row, anchor in zip(drawn.texts.tolist(), drawn.anchors.tolist(), strict=True):
        assert any(anchor == at and list(text) == batch.tokens[row, : len(text)].tolist() for text, at in old)
    texts = Rollout(batch.tokens, lengths, torch.full((4,), batch.tokens.shape[1]))
    state = read_text(qwen_drafter, texts, batch.features)
    again = draft_at(qwen_drafter, state, texts, *grid_of(drawn.texts, drawn.anchors, 4))
    assert torch.equal(drawn.draft_tokens, again.draft_tokens)
    # Remembered texts count as training blocks, never in acceptance.
    assert metrics.verifications == len(new.blocks)
    chosen = batch.rejected_weights > 0
    assert batch.draft_states[chosen].abs().sum(-1).min() > 0
    # The new texts, renewed, are the last to leave.
    assert tuple(new.tokens[0, : new.lengths[0]].tolist()) in list(buffer.entries)[-2:]


def test_metrics_by_hand():
    metrics = ReplayMetrics(
        committed=12,
        verifications=4,
        errors=3,
        blocks=5,
        supervised=9,
        text_tokens=20,
        outside_vocab=5,
        accepted_by_slot=[3, 1],
        valid_by_slot=[4, 2],
    )
    assert metrics.figures() == {
        "replay/blocks": (5, None),
        "replay/supervised_tokens": (9, None),
        "replay/outside_vocab": (5, 20),
        "acceptance/length": (12, 4),
        "replay/error_share": (3, 4),
        "acceptance/slot_1": (3, 4),
        "acceptance/slot_2": (1, 2),
    }


def test_text_tokens_outside_the_draft_vocabulary_are_counted(qwen_target, qwen_drafter, rollout):
    (batch,), metrics = BatchMaker(qwen_target, qwen_drafter, STREAMS, 0.5)([rollout], step=0)
    if qwen_drafter.vocab_map is None:
        assert metrics.figures()["replay/outside_vocab"] == (0, 0)
        return
    known = set(qwen_drafter.vocab_map.tolist())
    written = [token for text in rollout.completions() for token in text]
    outside = sum(token not in known for token in written)
    assert 0 < outside < len(written)
    assert (metrics.text_tokens, metrics.outside_vocab) == (len(written), outside)
    assert set(batch.blocks.draft_tokens[batch.rejected_weights > 0].tolist()) <= known


def test_metrics_of_a_fresh_rollout_equal_its_record(qwen_target, qwen_drafter, rollout):
    _, metrics = BatchMaker(qwen_target, qwen_drafter, STREAMS, 1.0)([rollout], step=0, fresh=True)
    assert metrics.committed == int((rollout.completion_lengths - 1).sum()) == 8 * 23
    assert metrics.verifications == len(rollout.blocks)
    assert metrics.errors == int(rollout.blocks.has_error.sum())
    assert metrics.accepted_by_slot[0] == int((rollout.blocks.num_accepted >= 1).sum())
