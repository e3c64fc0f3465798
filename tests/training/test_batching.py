"""From texts to training batches: what is in them, and independence of batch layout."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import ScriptedDrafter, counting_target, random_prompts, tiny_drafter

from draft_opd_trl.core.records import Rollout
from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.replay import draft_at, grid_of, read_text, replay_text, text_blocks
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate
from draft_opd_trl.training.batching import BatchMaker
from draft_opd_trl.training.block_choice import OnPolicySettings
from draft_opd_trl.training.divergences import LossSettings, StreamLosses
from draft_opd_trl.training.error_buffer import ErrorBuffer
from draft_opd_trl.training.losses import draft_loss
from draft_opd_trl.training.streams import StreamSettings


STREAMS = StreamSettings(rejected_weight=0.5, rejected_decay=0.5, sft_decay=0.7)
HARD = LossSettings("ce", 0.0)
SOFT = LossSettings("reverse_kl", 1.0)


@pytest.fixture(scope="module")
def rollout(qwen_target, qwen_drafter, prompts):
    texts = [*random_prompts(5, seed=31), *prompts[:3]]
    return speculate(qwen_target, qwen_drafter, texts, SpeculationSettings(24, [], keep_states=True))


def _maker(target, drafter, **on_policy):
    return BatchMaker(target, drafter, STREAMS, OnPolicySettings(**on_policy), seed=0)


def _losses(target, drafter, batches):
    total = sum(batch.denominator for batch in batches)
    sums = 0.0
    for batch in batches:
        batch.denominator = total
        sums = sums + draft_loss(drafter, target, batch, StreamLosses(HARD, SOFT))["loss"]
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
        maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, OnPolicySettings(num_anchors=5), 3, proposals=proposals)
        batches, counts = maker(layout, step=2, lmbda=lmbda, fresh=fresh)
        denominator = sum(batch.denominator for batch in batches).item()
        results.append((_union(layout, batches), denominator, counts))
        with torch.no_grad():
            results[-1] += (_losses(qwen_target, qwen_drafter, batches).item(),)
    assert results[0][0] == results[1][0] and len(results[0][0]) >= 24
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    assert results[0][2] == results[1][2]
    assert results[0][3] == pytest.approx(results[1][3], rel=1e-5)


def test_gradients_do_not_depend_on_the_batch_layout(qwen_target, kind, rollout):
    drafter = tiny_drafter(kind, qwen_target)
    gradients = []
    for layout in ([rollout], [rollout.part(0, 4), rollout.part(4, 8)]):
        batches, _ = _maker(qwen_target, drafter, num_anchors=5)(layout, step=0, lmbda=0.5)
        drafter.zero_grad()
        _losses(qwen_target, drafter, batches).backward()
        gradients.append([parameter.grad.clone() for parameter in drafter.parameters()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_dpace_does_not_depend_on_the_batch_layout(qwen_target, qwen_drafter, rollout, lmbda):
    """Invariant 6: weights are a block's own, and the denominator counts slots before any is weighed."""
    losses = StreamLosses(replace(HARD, dpace_alpha=0.5), SOFT)
    found = []
    for layout in ([rollout], [rollout.part(0, 4), rollout.part(4, 8)]):
        maker = BatchMaker(qwen_target, qwen_drafter, StreamSettings(), OnPolicySettings(num_anchors=5), seed=3)
        batches, _ = maker(layout, step=2, lmbda=lmbda)
        total = sum(batch.denominator for batch in batches)
        assert total == sum((batch.accepted_weights > 0).sum() for batch in batches)
        for batch in batches:
            batch.denominator = total
        with torch.no_grad():
            parts = [draft_loss(qwen_drafter, qwen_target, batch, losses)["loss"] for batch in batches]
        found.append(sum(parts).item())
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0] > 0


def test_random_anchors_are_cut_at_the_own_first_wrong_slot():
    """Spec-AUF by hand: the target counts, and the drafter is wrong behind every token 3 and 7."""
    proposals = [[(token + slot) % 12 for slot in (1, 2, 3)] for token in range(12)]
    for token in range(12):
        for slot in (1, 2, 3):
            if (token + slot) % 12 in (4, 8):
                proposals[token][slot - 1] = 0
    texts = Rollout.from_ids([[1, 2]], [[3, 4, 5, 6, 7, 8, 9, 10]])
    maker = BatchMaker(
        counting_target(),
        ScriptedDrafter(proposals),
        StreamSettings(sft_decay=1.0),
        OnPolicySettings("random"),
        seed=0,
    )
    (batch,), _ = maker([texts], step=0, lmbda=1.0)
    taught = dict(zip(batch.blocks.anchors.tolist(), batch.accepted_weights.sum(1).tolist(), strict=True))
    # The token at place i is i + 1. All places are anchors, not those alone that verification would stop at.
    assert taught == {2: 1, 3: 3, 4: 3, 5: 2, 6: 1, 7: 2, 8: 1}
    assert batch.denominator == 13
    errors = batch.labels[batch.blocks.has_error, batch.blocks.num_accepted[batch.blocks.has_error]]
    assert set(errors.tolist()) == {4, 8}, "and there the text's token is what is taught"


def test_argmax_proposals_are_drafted_in_the_precision_of_the_losses(qwen_target, qwen_drafter, rollout):
    """What 16-bit weights would propose, up to rounding; the target, and drawn proposals, keep their own dtype."""

    def blocks_of(autocast, proposals=None, **on_policy):
        maker = BatchMaker(
            qwen_target,
            qwen_drafter,
            STREAMS,
            OnPolicySettings(**on_policy),
            seed=0,
            proposals=proposals,
            autocast=autocast,
        )
        ((batch,), _) = maker([rollout], step=1, lmbda=1.0)
        return batch

    seen = []

    def autocast():
        seen.append(torch.autocast("cpu", torch.bfloat16))
        return seen[-1]

    plain, half = blocks_of(nullcontext, num_anchors=50), blocks_of(autocast, num_anchors=50)
    assert len(seen) == 1 and half.features.dtype == half.states.dtype == torch.float32
    assert torch.equal(half.states, plain.states)
    with torch.autocast("cpu", torch.bfloat16):
        expected = replay_text(qwen_drafter, rollout, plain.features)
    pairs = set(zip(half.blocks.texts.tolist(), half.blocks.anchors.tolist(), strict=True))
    assert pairs <= set(zip(expected.texts.tolist(), expected.anchors.tolist(), strict=True))
    blocks_of(autocast, num_anchors=50, anchors="random")
    assert len(seen) == 2
    blocks_of(autocast, SamplingParams(1.0), num_anchors=50)
    assert len(seen) == 2


@pytest.mark.parametrize(("lmbda", "shared"), [(1.0, True), (0.5, False)])
def test_features_are_copied_only_where_some_texts_are_not_replayed(qwen_target, rollout, lmbda, shared, monkeypatch):
    """They are the largest tensor of a step."""
    drafter, seen = tiny_drafter("dflash", qwen_target), []
    extend = drafter.extend

    def noting(state, features, *rest, **options):
        seen.append(features.untyped_storage().data_ptr())
        return extend(state, features, *rest, **options)

    monkeypatch.setattr(drafter, "extend", noting)
    ((batch,), _) = _maker(qwen_target, drafter, num_anchors=50)([rollout], step=1, lmbda=lmbda)
    assert seen and {place == batch.features.untyped_storage().data_ptr() for place in seen} == {shared}


def test_lmbda_decides_the_kind_of_block(qwen_target, qwen_drafter, rollout):
    maker = _maker(qwen_target, qwen_drafter, num_anchors=6)
    for lmbda in (0.0, 1.0):
        (batch,), counts = maker([rollout], step=0, lmbda=lmbda)
        if lmbda == 0:
            assert not batch.blocks.has_error.any() and batch.rejected_weights.sum() == 0
            assert torch.bincount(batch.blocks.texts).tolist() == [6] * 8
            assert counts["acceptance/length"] == (0, 0)
        else:
            assert batch.blocks.has_error.any() and batch.rejected_weights.sum() > 0
            assert counts["acceptance/length"][1] == len(rollout.blocks)
    mixed, _ = maker([rollout], step=0, lmbda=0.5)
    on_policy = set(mixed[0].blocks.texts[mixed[0].rejected_weights.sum(1) > 0].tolist())
    assert 0 < len(on_policy) < 8


def test_random_anchors_with_the_drafters_own_proposals(qwen_target, qwen_drafter, rollout):
    maker = _maker(qwen_target, qwen_drafter, num_anchors=6, anchors="random")
    (batch,), counts = maker([rollout], step=0, lmbda=1.0, fresh=True)
    assert torch.bincount(batch.blocks.texts).tolist() == [6] * 8
    exposed = set(zip(rollout.blocks.texts.tolist(), rollout.blocks.anchors.tolist(), strict=True))
    assert not exposed.issuperset(zip(batch.blocks.texts.tolist(), batch.blocks.anchors.tolist(), strict=True))
    state = read_text(qwen_drafter, rollout, batch.features)
    again = draft_at(qwen_drafter, state, rollout, *grid_of(batch.blocks.texts, batch.blocks.anchors, 8))
    assert torch.equal(batch.blocks.draft_tokens, again.draft_tokens)
    assert torch.equal(batch.blocks.num_accepted, again.num_accepted)
    # They are no verification of the text, so they count in no acceptance.
    assert "acceptance/length" not in counts and counts["replay/blocks"] == (48, None)


def test_sft_blocks_decay_as_the_drafter_has_it_where_nothing_is_set(qwen_target, qwen_drafter):
    for given, expected in ((None, qwen_drafter.sft_decay), (0.3, 0.3)):
        maker = BatchMaker(qwen_target, qwen_drafter, StreamSettings(sft_decay=given), OnPolicySettings(), seed=0)
        assert maker.streams.sft_decay == expected


def test_sft_and_opd_see_the_same_text(qwen_target, qwen_drafter, rollout):
    """What an SFT block teaches at a slot is the text there."""
    (batch,), _ = _maker(qwen_target, qwen_drafter, num_anchors=6)([rollout], step=0, lmbda=0.0)
    expected = text_blocks(rollout, batch.blocks.texts, batch.blocks.anchors, qwen_drafter.num_draft_tokens)
    assert torch.equal(batch.labels, expected.draft_tokens)
    assert torch.equal(batch.blocks.num_accepted, expected.num_valid)
    inside = torch.arange(qwen_drafter.num_draft_tokens) < expected.num_valid[:, None]
    decay = 0.7 ** torch.arange(qwen_drafter.num_draft_tokens)
    torch.testing.assert_close(batch.accepted_weights, inside * decay)


def test_text_states_predict_their_slots(qwen_target, qwen_drafter, rollout):
    """Greedy text: the state that predicts a slot has the slot's label as its argmax."""
    (batch,), _ = _maker(qwen_target, qwen_drafter)([rollout], step=0, lmbda=1.0)
    inside = torch.arange(qwen_drafter.num_draft_tokens) < batch.blocks.num_valid[:, None]
    said = qwen_target.logits(batch.text_states).argmax(-1)
    assert torch.equal(said[inside], batch.labels[inside])


def test_kept_states_equal_scored_ones(qwen_target, qwen_drafter, rollout):
    batches = []
    for texts in (rollout, Rollout(rollout.tokens, rollout.prompt_lengths, rollout.lengths, rollout.blocks)):
        (batch,), _ = _maker(qwen_target, qwen_drafter, num_anchors=5)([texts], step=0, lmbda=1.0, fresh=True)
        batches.append(batch)
    kept, scored = batches
    assert torch.equal(kept.blocks.anchors, scored.blocks.anchors)
    chosen = kept.rejected_weights > 0
    assert chosen.sum() > 20
    torch.testing.assert_close(kept.draft_states[chosen], scored.draft_states[chosen], rtol=1e-4, atol=1e-4)


def test_kept_states_follow_their_blocks_in_a_mixed_batch(qwen_target, qwen_drafter, rollout):
    maker = _maker(qwen_target, qwen_drafter, num_anchors=5)
    (kept,), _ = maker([rollout], step=0, lmbda=0.5, fresh=True)
    (scored,), _ = maker([rollout], step=0, lmbda=0.5, fresh=False)
    assert torch.equal(kept.blocks.anchors, scored.blocks.anchors)
    chosen = kept.rejected_weights > 0
    torch.testing.assert_close(kept.draft_states[chosen], scored.draft_states[chosen], rtol=1e-4, atol=1e-4)


def test_nothing_is_scored_without_a_rejected_stream(qwen_target, qwen_drafter, rollout, monkeypatch):
    monkeypatch.setattr(qwen_target, "score_blocks", None)
    maker = BatchMaker(qwen_target, qwen_drafter, StreamSettings(), OnPolicySettings(), seed=0)
    (batch,), _ = maker([rollout], step=0, lmbda=1.0)
    assert batch.draft_states is None
    assert batch.denominator == batch.accepted_weights.sum()


def test_draft_states_by_slow_scoring(qwen_target, qwen_drafter, rollout):
    """The state that judges a rejected slot has read the text up to the anchor and the drafted tokens after it."""
    (batch,), _ = _maker(qwen_target, qwen_drafter, num_anchors=2)([rollout], step=0, lmbda=1.0)
    checked = 0
    for index in batch.blocks.has_error.nonzero()[:6, 0].tolist():
        row, anchor = int(batch.blocks.texts[index]), int(batch.blocks.anchors[index])
        text = torch.cat([rollout.tokens[row, : anchor + 1], batch.blocks.draft_tokens[index, :-1]])[None]
        states = qwen_target.forward_text(text, ())[1][0, anchor:]
        chosen = batch.rejected_weights[index] > 0
        torch.testing.assert_close(batch.draft_states[index, chosen], states[chosen], rtol=1e-4, atol=1e-4)
        checked += int(chosen.sum())
    assert checked > 8


def test_the_denominator_is_the_batchs_own_weight(qwen_target, qwen_drafter, rollout):
    (batch,), _ = _maker(qwen_target, qwen_drafter)([rollout], step=0, lmbda=0.5)
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
    on_policy = OnPolicySettings(num_anchors=4, replay_ratio=1.0)
    maker = BatchMaker(qwen_target, qwen_drafter, STREAMS, on_policy, 0, buffer)
    (batch,), counts = maker([new], step=0, lmbda=1.0, fresh=True)
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
    assert counts["acceptance/length"][1] == len(new.blocks)
    chosen = batch.rejected_weights > 0
    assert batch.draft_states[chosen].abs().sum(-1).min() > 0
    # The new texts, renewed, are the last to leave.
    assert tuple(new.tokens[0, : new.lengths[0]].tolist()) in list(buffer.entries)[-2:]


def test_text_tokens_outside_the_draft_vocabulary_are_counted(qwen_target, qwen_drafter, rollout):
    (batch,), counts = _maker(qwen_target, qwen_drafter)([rollout], step=0, lmbda=0.5)
    if qwen_drafter.vocab_map is None:
        assert "replay/outside_vocab" not in counts
        return
    known = set(qwen_drafter.vocab_map.tolist())
    written = [token for text in rollout.completions() for token in text]
    outside = sum(token not in known for token in written)
    assert 0 < outside < len(written)
    assert counts["replay/outside_vocab"] == (outside, len(written))
    assert set(batch.blocks.draft_tokens[batch.rejected_weights > 0].tolist()) <= known


def test_counts_of_a_fresh_rollout_equal_its_record(qwen_target, qwen_drafter, rollout):
    _, counts = _maker(qwen_target, qwen_drafter)([rollout], step=0, lmbda=1.0, fresh=True)
    blocks = rollout.blocks
    assert counts["acceptance/length"] == (int((rollout.completion_lengths - 1).sum()), len(blocks))
    assert counts["acceptance/length"][0] == 8 * 23
    assert counts["replay/error_share"] == (int(blocks.has_error.sum()), len(blocks))
    judged = (int((blocks.num_accepted >= 1).sum()), int((blocks.num_valid >= 1).sum()))
    assert counts["acceptance/slot_1"] == judged
