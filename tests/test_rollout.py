"""Texts from every source are the target's."""

import pytest
from conftest import ScriptedDrafter, counting_target

from draft_opd_trl.rollout import write_texts
from draft_opd_trl.speculation import SpeculationSettings


SETTINGS = SpeculationSettings(4, [7], keep_states=True, pad_token_id=9)
ROWS = [{"prompt_ids": [1, 2], "completion_ids": [3, 4, 5, 6, 7]}, {"prompt_ids": [5], "completion_ids": [6, 7]}]


@pytest.mark.parametrize("source", ["speculation", "generate", "dataset"])
def test_every_source_gives_the_same_text(source):
    drafter = ScriptedDrafter([[token + 1, 0] for token in range(12)])
    rollout = write_texts(source, ROWS, counting_target(), drafter, SETTINGS)
    # Texts of the data set are cut to `max_new_tokens` as generated ones are.
    assert rollout.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 9, 9, 9]]
    assert rollout.prompt_lengths.tolist() == [2, 1] and rollout.lengths.tolist() == [6, 3]
    assert (rollout.blocks is not None) == (source == "speculation")
    assert (rollout.block_states is not None) == (source == "speculation")
