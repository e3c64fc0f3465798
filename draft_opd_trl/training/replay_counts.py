"""What an optimizer step met, counted: τ and acceptance by slot, what was trained on, what no drafter can propose.

Counts are by name a part and its whole; without one, the part is counted a step. Of a whole of 0 there is no figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..core.records import DraftBlocks, ReplayBatch, Rollout
from ..core.vocabulary import to_draft_ids


Counts = dict[str, tuple[int, int | None]]


def count_texts(rollout: Rollout, stop_token_ids: Sequence[int]) -> Counts:
    """What was written: lengths of completions, those that were cut off, and all tokens read."""
    lengths = rollout.completion_lengths
    ends = rollout.tokens.gather(1, rollout.lengths[:, None] - 1)
    clipped = ~torch.isin(ends, torch.tensor(stop_token_ids, device=ends.device))
    texts = len(rollout)
    return {
        "completions/mean_length": (int(lengths.sum()), texts),
        "completions/min_length": (int(lengths.min()), texts),
        "completions/max_length": (int(lengths.max()), texts),
        "completions/clipped_ratio": (int(clipped.sum()), texts),
        "num_tokens": (int(rollout.lengths.sum()), None),
    }


def count_verification(rollout: Rollout, blocks: DraftBlocks) -> Counts:
    """What verification said of the drafter along whole texts: of a text that has blocks, all of them are here."""
    replayed = torch.bincount(blocks.texts, minlength=len(rollout)) > 0
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.texts.device)
    accepted, valid = ((slots < until[:, None]).sum(0) for until in (blocks.num_accepted, blocks.num_valid))
    by_slot = zip(accepted.tolist(), valid.tolist(), strict=True)
    return {
        # A text's first token comes from the prefill.
        "acceptance/length": (int((rollout.completion_lengths - 1)[replayed].sum()), len(blocks)),
        "replay/error_share": (int(blocks.has_error.sum()), len(blocks)),
        **{f"acceptance/slot_{slot}": counts for slot, counts in enumerate(by_slot, start=1)},
    }


def count_outside(rollout: Rollout, vocab_map: torch.Tensor) -> Counts:
    """Completion tokens that the drafter cannot propose, whatever it learns."""
    places = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
    written = (places >= rollout.prompt_lengths[:, None]) & (places < rollout.lengths[:, None])
    _, inside = to_draft_ids(rollout.tokens[written], vocab_map)
    return {"replay/outside_vocab": (int((~inside).sum()), inside.numel())}


def count_taught(batch: ReplayBatch) -> Counts:
    """Blocks trained on, and slots of a weight in either stream."""
    supervised = (batch.accepted_weights > 0) | (batch.rejected_weights > 0)
    return {"replay/blocks": (len(batch.blocks), None), "replay/supervised_tokens": (int(supervised.sum()), None)}


def add_counts(parts: Iterable[Counts]) -> Counts:
    """Parts and wholes added up by name."""
    total: Counts = {}
    for counts in parts:
        for name, (part, whole) in counts.items():
            before, of = total.get(name, (0, None if whole is None else 0))
            total[name] = (before + part, None if whole is None else of + whole)
    return total
