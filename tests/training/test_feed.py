"""Which texts serve which micro-step, with a writer and a batch maker that only take notes."""

from types import SimpleNamespace

import pytest
import torch

from draft_opd_trl.core.records import DraftBlocks, Rollout
from draft_opd_trl.training.feed import BatchFeed, EpochSampler


class Notes:
    """Stands for the writer of texts and for the batch maker: a text is its row's number, a batch its first text."""

    def __init__(self):
        self.written, self.made = [], []

    def write(self, rows):
        self.written.append(rows)
        texts = Rollout.from_ids([[row] for row in rows], [[7, 8]] * len(rows))
        texts.blocks = DraftBlocks.empty(2)
        return texts

    def make(self, rollouts, step, lmbda, fresh):
        firsts = [rollout.tokens[:, 0].tolist() for rollout in rollouts]
        self.made.append((firsts, step, lmbda, fresh, all(rollout.blocks is not None for rollout in rollouts)))
        batches = [SimpleNamespace(texts=texts, denominator=torch.tensor(float(sum(texts)))) for texts in firsts]
        return batches, {"replay/blocks": (len(rollouts), None)}


def feed_of(notes, ranks=1, steps_per_generation=4, accumulation_steps=2):
    accelerator = SimpleNamespace(
        reduce=lambda value, reduction: value * ranks, num_processes=ranks, device=torch.device("cpu")
    )
    return BatchFeed(notes.write, notes.make, accelerator, 2, steps_per_generation, accumulation_steps)


def test_texts_are_written_once_a_cycle_and_batches_made_once_a_step():
    notes = Notes()
    feed, rows = feed_of(notes), list(range(1, 9))
    served = [feed.next(rows, step, lmbda=0.5) for step in (0, 0, 1, 1)]
    assert notes.written == [rows]
    # In the step that wrote them texts still have their blocks; later the drafter has moved on.
    assert notes.made == [
        ([[1, 2], [3, 4]], 0, 0.5, True, True),
        ([[5, 6], [7, 8]], 1, 0.5, False, False),
    ]
    assert [batch.texts for batch, _ in served] == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert [bool(counts) for _, counts in served] == [True, False, True, False]
    feed.next([9, 9, 9, 9, 9, 9, 9, 9], 2, lmbda=1.0)
    assert len(notes.written) == 2 and notes.made[-1][1:] == (2, 1.0, True, True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_denominator_is_the_whole_steps(ranks):
    feed = feed_of(Notes(), ranks)
    batches = [feed.next(list(range(1, 9)), 0, 1.0)[0] for _ in range(2)]
    # All ranks met the same: DDP averages over them, so a rank divides by its share.
    assert [float(batch.denominator) for batch in batches] == [10, 10]


def test_a_feed_goes_on_from_its_state():
    notes, rows = Notes(), list(range(1, 9))
    feed, other = feed_of(Notes()), feed_of(notes)
    for _ in range(2):
        feed.next(rows, 0, 1.0)
    other.load_state_dict(feed.state_dict())
    batch, _ = other.next([], 1, 1.0)
    assert batch.texts == [5, 6] and notes.written == []
    assert notes.made == [([[5, 6], [7, 8]], 1, 1.0, False, False)]


def test_the_order_of_rows_is_that_of_seed_and_epoch():
    def order(epoch):
        sampler = EpochSampler(data_source=list(range(12)), mini_repeat_count=1, batch_size=4, repeat_count=1, seed=5)
        sampler.set_epoch(epoch)
        return list(sampler)

    sampler = EpochSampler(data_source=list(range(12)), mini_repeat_count=1, batch_size=4, repeat_count=1, seed=5)
    sampler.set_epoch(0)
    first, second = list(sampler), list(sampler)
    assert (order(0), order(1)) == (first, second) and first != second
    assert sorted(first) == list(range(12))
