"""The draft vocabulary by hand: which tokens are kept, how much text they cover, and where a token stands."""

import pytest
import torch

from draft_opd_trl.core.vocabulary import draft_vocabulary, to_draft_ids


TEXTS = [[3, 3, 3, 1], [1, 5, 6, 3], [2, 1]]  # 3 four times, 1 three times, 2, 5 and 6 once


def test_the_most_frequent_tokens_are_kept_and_of_equals_the_lower(capsys):
    vocabulary = draft_vocabulary(TEXTS, vocab_size=8, size=3)
    assert vocabulary.token_ids == [1, 2, 3]
    assert vocabulary.coverage == pytest.approx(8 / 10)
    assert capsys.readouterr().out == "3 draft tokens cover 80.00% of 10 text tokens\n"


def test_special_and_stop_tokens_are_kept_however_rare():
    vocabulary = draft_vocabulary(TEXTS, vocab_size=8, size=3, keep=[7, 6])
    assert vocabulary.token_ids == [3, 6, 7]
    assert vocabulary.coverage == pytest.approx(5 / 10)


def test_the_vocabulary_depends_on_counts_alone():
    shuffled = [TEXTS[2], TEXTS[0][::-1], torch.tensor(TEXTS[1])]
    assert draft_vocabulary(shuffled, 8, 4, keep={0}) == draft_vocabulary(TEXTS, 8, 4, keep=[0])


def test_no_size_keeps_the_whole_vocabulary_and_unseen_tokens_fill_a_large_one():
    assert draft_vocabulary(TEXTS, 8, None).token_ids == list(range(8))
    assert draft_vocabulary(TEXTS, 8, 7).token_ids == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 8]], 8, 3), "ids from 1 to 8 do not lie in the target's vocabulary of 8"),
        ((TEXTS, 8, 3, [-1]), "ids from -1 to -1 do not lie"),
        (
            (TEXTS, 8, 9),
            "vocabulary of 9 cannot be made: it must hold the 0 tokens to keep and at most the target's 8",
        ),
        ((TEXTS, 8, 1, [0, 7]), "vocabulary of 1 cannot be made: it must hold the 2 tokens"),
        (([], 8, 3, [1]), "no text to count"),
    ],
)
def test_a_vocabulary_that_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        draft_vocabulary(*arguments)


def test_target_ids_to_draft_ids():
    ids, inside = to_draft_ids(torch.tensor([[0, 1, 2], [5, 6, 47]]), torch.tensor([0, 2, 5]))
    assert inside.tolist() == [[True, False, True], [True, False, False]]
    assert ids[inside].tolist() == [0, 1, 2]
