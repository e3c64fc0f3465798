"""
Speculation: lossless at T = 0 token for token and at T > 0 in law, and an honest record of what verification said.

Scripted targets first, then every family with every kind of drafter, with transformers' own decoding as the reference.
"""

import pytest
import torch
from conftest import (
    LAWS,
    ScriptedDrafter,
    chi_square_p,
    counting_target,
    random_prompts,
    scripted_target,
    tiny_drafter,
)
from invariants import (
    assert_kept_states_are_those_of_packed_scoring,
    assert_lossless,
    assert_texts_follow_the_targets_law,
    generated,
)

from draft_opd_trl.core.sampling_params import SamplingParams
from draft_opd_trl.decoding.speculation import SpeculationSettings, speculate


# -- scripted: after t comes t + 1, modulo 12 --------------------------------------------------------------------


def _counting_drafter(wrong=()):
    """Proposes t + 1, t + 2, t + 3, with the slots in `wrong` `(token, slot)` off by one."""
    proposals = (torch.arange(12)[:, None] + torch.arange(1, 4)) % 12
    for token, slot in wrong:
        proposals[token, slot - 1] = (proposals[token, slot - 1] + 1) % 12
    return ScriptedDrafter(proposals)


def test_recorded_blocks_by_hand():
    # Prompt [1]; the prefill writes 2. The block after 2 errs at slot 2, that after 4 at slot 1, that after 5 nowhere.
    drafter = _counting_drafter(wrong=[(2, 2), (4, 1)])
    rollout = speculate(counting_target(), drafter, [[1]], SpeculationSettings(9, []))
    assert rollout.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert rollout.prompt_lengths.tolist() == [1] and rollout.lengths.tolist() == [10]
    blocks = rollout.blocks
    # After 2: 3 accepted, 5 rejected, 4 recovered. After 4: 6 rejected, 5 recovered. After 5: all three, bonus 9.
    assert blocks.anchors.tolist() == [1, 3, 4, 8]
    assert blocks.draft_tokens.tolist() == [[3, 5, 5], [6, 6, 7], [6, 7, 8], [10, 11, 0]]
    # The last block has one slot inside the text.
    assert blocks.num_valid.tolist() == [3, 3, 3, 1]
    assert blocks.num_accepted.tolist() == [1, 0, 3, 1]
    assert blocks.has_error.tolist() == [True, True, False, False]
    assert blocks.error_positions[:2].tolist() == [3, 4]


def test_a_stop_token_inside_an_accepted_run_ends_the_text():
    rollout = speculate(counting_target(), _counting_drafter(), [[1]], SpeculationSettings(9, [5, 4]))
    assert rollout.completions() == [[2, 3, 4]]
    assert rollout.blocks.num_valid.tolist() == [2] and rollout.blocks.num_accepted.tolist() == [2]


def test_a_stop_token_as_recovered_token_ends_the_text():
    rollout = speculate(counting_target(), _counting_drafter([(2, 2)]), [[1]], SpeculationSettings(9, [4]))
    assert rollout.completions() == [[2, 3, 4]]
    # 3 accepted; where 4 belongs the drafter said 5: an error in the text's last token.
    assert rollout.blocks.num_valid.tolist() == [2] and rollout.blocks.num_accepted.tolist() == [1]
    assert rollout.blocks.error_positions.tolist() == [3]


def test_a_stop_token_among_rejected_proposals_does_not_end_the_text():
    rollout = speculate(counting_target(), _counting_drafter([(2, 2)]), [[1]], SpeculationSettings(5, [9, 5]))
    # Slot 2 of the block after 2 proposes the stop token 5, but 4 is written.
    assert rollout.completions() == [[2, 3, 4, 5]]


def test_a_first_token_that_stops_leaves_no_block():
    rollout = speculate(counting_target(), _counting_drafter(), [[1], [4]], SpeculationSettings(6, [2]))
    assert rollout.completions() == [[2], [5, 6, 7, 8, 9, 10]]
    assert rollout.blocks.texts.tolist() == [1, 1]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6])
def test_max_new_tokens_is_exact(limit):
    rollout = speculate(counting_target(), _counting_drafter(), [[1], [3]], SpeculationSettings(limit, []))
    assert rollout.completion_lengths.tolist() == [limit, limit]
    assert (rollout.blocks.anchors + rollout.blocks.num_valid < rollout.lengths[rollout.blocks.texts]).all()
    assert rollout.completions()[0] == list(range(2, 2 + limit))


def test_only_single_token_texts_have_an_empty_record():
    blocks = speculate(counting_target(), _counting_drafter(), [[1]], SpeculationSettings(1, [])).blocks
    assert len(blocks) == 0 and blocks.num_draft_tokens == 3


def test_progress_counts_by_hand():
    calls = []
    speculate(
        counting_target(),
        _counting_drafter(),
        [[1], [2]],
        SpeculationSettings(6, []),
        on_round=lambda *numbers: calls.append(numbers),
    )
    # Each row: first token from the prefill, then 4 committed, then 1. Two verifications a round.
    assert calls == [(0, 8, 2), (2, 10, 4)]


def test_a_freed_slot_is_refilled_at_once():
    calls = []
    rollout = speculate(
        counting_target(),
        _counting_drafter(),
        [[9], [1], [9], [9]],
        SpeculationSettings(11, [11], batch_size=2),
        on_round=lambda *numbers: calls.append(numbers),
    )
    # Short texts are 10, 11: one verification. The long one is 2 … 11: three. With refill three rounds do.
    assert rollout.completions() == [[10, 11], list(range(2, 12)), [10, 11], [10, 11]]
    assert len(calls) == 3 and calls[-1][2] == 6


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="at least one prompt, and each at least one token"):
        speculate(counting_target(), None, prompts, SpeculationSettings(3, []))


# -- greedy: equal to transformers' generate (invariant 1) ---------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_greedy_speculation_is_the_targets_text(target, drafter, prompts, batch_size):
    assert any(len(prompt) == 1 for prompt in prompts) and len({len(prompt) for prompt in prompts}) > 3
    rollout = assert_lossless(target, drafter, prompts, SpeculationSettings(30, [], batch_size=batch_size))
    assert len(set(rollout.blocks.num_accepted.tolist())) >= 3, "the case must hold early and late errors"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_speculation_with_several_stop_tokens(target, drafter, prompts, batch_size):
    stops = [generated(target, prompts[row], length)[-1] for row, length in ((0, 10), (2, 5), (3, 15))]
    rollout = assert_lossless(target, drafter, prompts, SpeculationSettings(30, stops, batch_size=batch_size))
    assert len(set(rollout.completion_lengths.tolist())) > 2, "the case must end texts early and not"


def test_an_untrained_drafter_is_lossless_too(target, kind, prompts):
    assert_lossless(target, tiny_drafter(kind, target), prompts, SpeculationSettings(16, [], batch_size=4))


def test_without_a_drafter_it_is_generate(target, prompts):
    rollout = speculate(target, None, prompts, SpeculationSettings(20, [], batch_size=3))
    assert rollout.completions() == [generated(target, prompt, 20) for prompt in prompts]
    assert rollout.blocks is None


def test_speculation_leaves_the_target_alone(target, drafter, prompts):
    """Invariant 5, target part."""
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    speculate(target, drafter, prompts, SpeculationSettings(8, []))
    assert all(torch.equal(value, before[name]) for name, value in target.model.state_dict().items())


# -- sampling: the law (invariant 2) -------------------------------------------------------------------------------


@pytest.mark.parametrize("sample_proposals", [False, True], ids=["argmax", "sampled"])
@pytest.mark.parametrize("sampling", LAWS.values(), ids=LAWS)
def test_sampled_text_follows_the_targets_law(small_target, small_drafter, sampling, sample_proposals):
    assert_texts_follow_the_targets_law(small_target, small_drafter, sampling, sample_proposals)


@pytest.mark.parametrize("sample_proposals", [False, True], ids=["argmax", "sampled"])
def test_scripted_sampling_law(sample_proposals):
    """Hand-made law: after any token, 0 with 1/2, 1 with 1/4, 2 and 3 with 1/8; the drafter likes 1."""
    law = torch.tensor([0.5, 0.25, 0.125, 0.125])
    target = scripted_target(torch.cat([law.log(), torch.full((4,), -1e4)]).expand(8, -1))
    probs = torch.tensor([0.125, 0.625, 0.125, 0.125, 0, 0, 0, 0]).expand(8, 2, -1)
    drafter = ScriptedDrafter(torch.ones((8, 2), dtype=torch.long), probs)
    settings = SpeculationSettings(4, [], SamplingParams(1.0), sample_proposals, batch_size=500)
    rollout = speculate(target, drafter, [[0]] * 4000, settings, torch.Generator().manual_seed(1))
    tokens = rollout.tokens[:, 2:5].flatten()
    assert chi_square_p(torch.bincount(tokens, minlength=4), law) > 1e-4
    first_blocks = rollout.blocks.select(rollout.blocks.anchors == 1)
    accepted = (first_blocks.num_accepted > 0).long()
    # Argmax: accepted with p(1) = 1/4. Sampled: the overlap Σ min = 1/8 + 1/4 + 1/8 + 1/8.
    rate = 0.625 if sample_proposals else 0.25
    assert chi_square_p(torch.bincount(accepted, minlength=2), torch.tensor([1 - rate, rate])) > 1e-4


def test_sampling_is_repeatable_from_a_generator(qwen_target, qwen_drafter, prompts):
    settings = SpeculationSettings(12, [], SamplingParams(1.0), sample_proposals=True)
    texts = [
        speculate(qwen_target, qwen_drafter, prompts, settings, torch.Generator().manual_seed(seed)).completions()
        for seed in (4, 4, 5)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sample_proposals", [False, True], ids=["argmax", "sampled"])
def test_a_drawn_text_depends_on_its_prompt_and_seed_alone(target, drafter, sample_proposals):
    """Not on the batch, the lane, the order, or the other texts."""
    prompts, seeds = random_prompts(9, seed=6), list(range(9))

    def texts(order, batch_size):
        settings = SpeculationSettings(16, [3, 9, 17, 30, 41], SamplingParams(1.0), sample_proposals, batch_size)
        drawn = speculate(target, drafter, [prompts[i] for i in order], settings, seeds=[seeds[i] for i in order])
        return dict(zip(order, drawn.completions(), strict=True))

    whole = texts(range(9), 16)
    assert len({len(text) for text in whole.values()}) > 2, "lanes must be freed at different times"
    for order, batch_size in ((range(9), 1), (range(9), 4), (range(8, -1, -1), 3), ([4, 7, 2], 2), ([5], 1)):
        part = texts(order, batch_size)
        assert part == {index: whole[index] for index in order}
    seeds = [seed + 1 for seed in seeds]
    assert texts(range(9), 16) != whole


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0)], ids=["greedy", "sampled"])
def test_kept_states_equal_packed_scoring(target, drafter, sampling):
    assert_kept_states_are_those_of_packed_scoring(target, drafter, sampling)


def test_states_are_kept_only_when_asked(qwen_target, qwen_drafter, prompts):
    assert speculate(qwen_target, qwen_drafter, prompts, SpeculationSettings(4, [])).block_states is None


def test_record_is_in_text_order_and_covers_the_text(target, drafter, prompts):
    rollout = speculate(target, drafter, prompts, SpeculationSettings(24, [], batch_size=3))
    blocks = rollout.blocks
    for row in range(len(rollout)):
        mine = blocks.select(blocks.texts == row)
        assert mine.anchors[0] == rollout.prompt_lengths[row]
        # The next anchor stands on the token after the accepted run.
        assert torch.equal(mine.anchors[1:], (mine.anchors + mine.num_accepted + 1)[:-1])
    assert torch.equal(blocks.texts, blocks.texts.sort().values)
