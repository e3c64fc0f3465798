"""The buffer of error positions: what it keeps, what it forgets, and what it draws."""

import torch
from conftest import chi_square_p

from draft_opd_trl.core.records import DraftBlocks, Rollout
from draft_opd_trl.training.error_buffer import ErrorBuffer


def _error_blocks():
    return DraftBlocks(
        torch.tensor([0, 0, 1, 2, 2]),
        torch.tensor([1, 3, 2, 1, 2]),
        torch.zeros((5, 3), dtype=torch.long),
        torch.tensor([1, 0, 1, 0, 1]),
        torch.tensor([3, 3, 1, 2, 2]),
    )


def _buffer(size=10):
    buffer = ErrorBuffer(size)
    rollout = Rollout.from_ids([[1], [4, 5], [6]], [[2, 3, 4, 5], [6, 7], [7, 8, 9]])
    buffer.add(rollout, _error_blocks())
    return buffer


def test_buffer_keeps_texts_with_errors_and_their_anchors():
    buffer = _buffer()
    # Text 1 had no error.
    kept = [(entry.tokens, entry.prompt_length, list(entry.losses)) for entry in buffer.entries.values()]
    assert kept == [([1, 2, 3, 4, 5], 1, [1, 3]), ([6, 7, 8, 9], 1, [1, 2])]


def test_buffer_drops_the_oldest():
    buffer = _buffer(size=1)
    assert list(buffer.entries) == [(6, 7, 8, 9)]


def test_a_text_seen_again_is_renewed_and_keeps_what_is_known():
    buffer = _buffer()
    rollout = Rollout.from_ids([[1]], [[2, 3, 4, 5]])
    # Anchor 1 is right now, anchor 2 is new.
    again = DraftBlocks(*(torch.tensor(v) for v in ([0, 0, 0], [1, 2, 3], [[0] * 3] * 3, [3, 0, 0], [3, 2, 1])))
    buffer.note(rollout.tokens, rollout.lengths, again, torch.tensor([0.5, 9.0, 2.0]))
    assert buffer.entries[1, 2, 3, 4, 5].losses == {1: 0.5, 3: 2.0}
    buffer.add(rollout, again)
    assert list(buffer.entries) == [(6, 7, 8, 9), (1, 2, 3, 4, 5)]
    assert buffer.entries[1, 2, 3, 4, 5].losses == {2: None, 3: 2.0}


def test_drawing_by_last_loss_has_its_law():
    buffer = ErrorBuffer(10, by_loss=True)
    rollout = Rollout.from_ids([[1], [4]], [[2, 3, 4, 5], [6, 7, 8]])
    blocks = DraftBlocks(
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1, 2, 3, 1]),
        torch.zeros((4, 3), dtype=torch.long),
        torch.zeros(4, dtype=torch.long),
        torch.ones(4, dtype=torch.long),
    )
    buffer.add(rollout, blocks)
    # Anchor 3 was not trained on, and counts as the greatest: text 0 weighs (3 + 1 + 8) / 3, text 1 weighs 8.
    trained = torch.tensor([0, 1, 3])
    buffer.note(rollout.tokens, rollout.lengths, blocks.select(trained), torch.tensor([3.0, 1.0, 8.0]))
    counts, draws = torch.zeros(2, 4), torch.Generator().manual_seed(0)
    for _ in range(2000):
        drawn, _, anchors = buffer.draw(1, 1, draws)
        counts[int(drawn.tokens[0, 0] == 4), int(anchors)] += 1
    law = torch.tensor([[0, 3 / 12, 1 / 12, 8 / 12], [0, 1, 0, 0]]) * torch.tensor([[1 / 3], [2 / 3]])
    assert chi_square_p(counts, law) > 1e-4
    assert chi_square_p(counts, torch.tensor([[0, 1, 1, 1], [0, 3, 0, 0]]) / 6) < 1e-6


def test_buffer_draw():
    rollout, owners, anchors = _buffer().draw(5, 10, torch.Generator().manual_seed(0))
    assert len(rollout) == 2
    for text in range(2):
        tokens = rollout.tokens[text, : rollout.lengths[text]].tolist()
        expected = {1: [1, 3], 6: [1, 2]}[tokens[0]]
        assert anchors[owners == text].tolist() == expected
    assert rollout.prompt_lengths.tolist() == [1, 1]
    assert sorted(rollout.completions()) == [[2, 3, 4, 5], [7, 8, 9]]
    assert len(_buffer().draw(1, 10, torch.Generator().manual_seed(0))[0]) == 1
    # The cap on anchors holds for each text.
    assert _buffer().draw(5, 1, torch.Generator().manual_seed(0))[1].bincount().tolist() == [1, 1]


def test_buffer_state_round_trip():
    buffer, other = _buffer(), ErrorBuffer(10)
    other.add(Rollout.from_ids([[9]], [[9, 9]]), DraftBlocks(*(torch.tensor(v) for v in ([0], [1], [[3]], [0], [1]))))
    other.load_state_dict(buffer.state_dict())
    assert other.entries == buffer.entries
    draws = [held.draw(1, 10, torch.Generator().manual_seed(3))[0].tokens for held in (buffer, other)]
    assert torch.equal(*draws)
