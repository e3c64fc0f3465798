"""Random numbers that depend on a text and nothing else."""

import torch
from conftest import chi_square_p

from draft_opd_trl.core.seeding import seed_of, text_generator, text_uniforms


def test_text_generator_depends_on_seed_step_and_text_alone():
    tokens = torch.tensor([1, 2, 3])
    first = torch.rand(2, generator=text_generator(0, 5, tokens))
    assert torch.equal(first, torch.rand(2, generator=text_generator(0, 5, tokens.clone())))
    for other in (text_generator(1, 5, tokens), text_generator(0, 6, tokens), text_generator(0, 5, tokens[:2])):
        assert not torch.equal(first, torch.rand(2, generator=other))


def test_seed_of_depends_on_all_its_parts():
    assert seed_of(0, 1, [2, 3]) == seed_of(0, 1, [2, 3])
    assert len({seed_of(0, 1, [2, 3]), seed_of(1, 1, [2, 3]), seed_of(0, 2, [2, 3]), seed_of(0, 1, [2, 4])}) == 4


def test_numbers_of_texts_are_even_and_apart():
    """Each of 64 cells as often as the others; neighbours in seed, position and purpose know nothing of each other."""
    seeds, positions = torch.arange(200), torch.arange(1, 201).expand(200, -1)
    even = torch.full((64,), 1 / 64)
    by_purpose = [text_uniforms(seeds, positions, purpose) for purpose in range(3)]
    for values in by_purpose:
        assert 0 <= values.min() and values.max() < 1
        assert chi_square_p(torch.bincount((values.flatten() * 64).long(), minlength=64), even) > 1e-4
    pairs = [(by_purpose[0][1:], by_purpose[0][:-1]), (by_purpose[0][:, 1:], by_purpose[0][:, :-1]), by_purpose[:2]]
    for first, second in [*pairs, by_purpose[1:]]:
        cells = (first.flatten() * 8).long() * 8 + (second.flatten() * 8).long()
        assert chi_square_p(torch.bincount(cells, minlength=64), even) > 1e-4
    # As splitmix64 has them in Python's integers, which do not overflow.
    expected = [0.8300421022736726, 0.31665098270182956]
    assert text_uniforms(torch.tensor([7]), torch.tensor([[5, 6]]), 1)[0].tolist() == expected
