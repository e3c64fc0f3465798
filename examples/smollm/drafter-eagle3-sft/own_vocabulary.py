"""A draft vocabulary in a drafter: the tables that folders hold, and the ids they stand for.

A folder's `d2t` `(DV,)` is what to add to a draft id, and `t2d` `(V,)` says which of the target's tokens can be
drafted; that is how `speculators`, SpecForge and the engines have it. Knows no drafter kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .errors import InputError


def draft_vocab_size_of(draft_token_ids: Sequence[int] | None, size: int | None, vocab_size: int) -> int:
    """
    How many tokens a config can draft; all of them by default.

    Raises:
        `ValueError`: `draft_token_ids` leave the target's vocabulary.
    """
    if draft_token_ids and not 0 <= draft_token_ids[0] <= draft_token_ids[-1] < vocab_size:
        raise InputError(
            f"draft_token_ids from {draft_token_ids[0]} to {draft_token_ids[-1]} must lie in the target's "
            f"vocabulary of {vocab_size}, in ascending order. Make them with `draft_vocabulary`."
        )
    return len(draft_token_ids) if draft_token_ids else size or vocab_size


def check_tokens_are_named(draft_token_ids: Sequence[int] | None, size: int | None, vocab_size: int) -> None:
    """
    Raises:
        `ValueError`: The size of a draft vocabulary without its tokens.
    """
    if draft_token_ids is None and size not in (None, vocab_size):
        raise InputError(
            f"draft_vocab_size={size} says how many tokens, not which. Pass `draft_token_ids` (see "
            "`draft_vocabulary`), or neither for the target's whole vocabulary."
        )


class OwnVocabulary:
    """A mixin before [`Drafter`], over a config with `vocab_size`, `draft_vocab_size` and `draft_token_ids`."""

    def add_tables(self, config: Any) -> None:
        # A whole vocabulary has no tables, not even trivial ones: vLLM refuses them there.
        if config.draft_vocab_size != config.vocab_size:
            ids = torch.tensor(config.draft_token_ids or range(config.draft_vocab_size), dtype=torch.long)
            self.register_buffer("d2t", ids - torch.arange(len(ids)))
            self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True))

    @property
    def vocab_map(self) -> torch.Tensor | None:
        offsets = getattr(self, "d2t", None)
        return None if offsets is None else offsets + torch.arange(len(offsets), device=offsets.device)

    def refuse_misfit(self, faults: list[str], target: Any) -> None:
        if self.vocab_map is not None and not torch.equal(self.vocab_map, self.t2d.nonzero()[:, 0]):
            faults = [*faults, "d2t and t2d do not hold the same tokens in ascending order"]
        super().refuse_misfit(faults, target)
