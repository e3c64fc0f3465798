"""Code run for its sizes: what is counted, what holds values, and what has none."""

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from draft_opd_trl.core.shapes import SMALL, LiveBytes, Shapes, tensor_bytes


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
