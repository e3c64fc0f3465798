"""A draft vocabulary: which of the target's tokens a drafter can propose, and where a token stands among them.

Knows no models. A draft vocabulary is its tokens' target ids in ascending order; a token's draft id is its rank there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .errors import InputError


@dataclass(frozen=True)
class DraftVocabulary:
    """
    Args:
        token_ids (`list[int]`): Target ids, ascending.
        coverage (`float`): Share of the counted text tokens that are among them.
        num_tokens (`int`): Text tokens counted.
    """

    token_ids: list[int]
    coverage: float
    num_tokens: int

    def __str__(self) -> str:
        return f"{len(self.token_ids)} draft tokens cover {self.coverage:.2%} of {self.num_tokens} text tokens"


def draft_vocabulary(
    texts: Iterable[Sequence[int]], vocab_size: int, size: int | None, keep: Iterable[int] = ()
) -> DraftVocabulary:
    """
    The most frequent tokens of the text a drafter will train on; prints how much of that text they cover.

    Depends on the counts alone (of equally frequent tokens the lower id goes first), so ranks that count the same text
    build the same vocabulary.

    Args:
        texts (`Iterable[Sequence[int]]`): Token ids, such as the completions the target wrote.
        vocab_size (`int`): The target's.
        size (`int`, *optional*): Tokens to keep; `None` keeps all.
        keep (`Iterable[int]`, *optional*): Tokens kept however rare: special tokens and every stop token.

    Returns:
        [`DraftVocabulary`], whose `token_ids` go into `create_drafter`.

    Raises:
        `ValueError`: No text, a token outside the target's vocabulary, or a size that cannot hold `keep`.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    kept = torch.tensor(sorted(set(keep)), dtype=torch.long)
    for ids in [kept, *(torch.as_tensor(text, dtype=torch.long) for text in texts)]:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise InputError(
                f"Token ids from {int(ids.min())} to {int(ids.max())} do not lie in the target's vocabulary of "
                f"{vocab_size}. Tokenise with the target's own tokenizer."
            )
        counts += torch.bincount(ids, minlength=vocab_size)
    counts[kept] -= 1
    total = int(counts.sum())
    if total == 0:
        raise InputError("There is no text to count tokens in. Pass the texts the drafter will train on.")
    size = vocab_size if size is None else size
    if not max(len(kept), 1) <= size <= vocab_size:
        raise InputError(
            f"A draft vocabulary of {size} cannot be made: it must hold the {len(kept)} tokens to keep and at most "
            f"the target's {vocab_size}. Choose a size between them."
        )
    ranked = counts.clone()
    ranked[kept] = total + 1
    chosen = torch.argsort(ranked, descending=True, stable=True)[:size].sort().values
    vocabulary = DraftVocabulary(chosen.tolist(), float(counts[chosen].sum()) / total, total)
    print(vocabulary)
    return vocabulary


def to_draft_ids(tokens: torch.Tensor, vocab_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Target ids → draft ids.

    Args:
        tokens (`torch.LongTensor` of any shape): Target ids.
        vocab_map (`torch.LongTensor` of shape `(DV,)`): Draft id → target id, ascending.

    Returns:
        Draft ids, and a bool of the same shape that is `False` where the token has none (its id is then arbitrary).
    """
    ids = torch.searchsorted(vocab_map, tokens).clamp(max=len(vocab_map) - 1)
    return ids, vocab_map[ids] == tokens
