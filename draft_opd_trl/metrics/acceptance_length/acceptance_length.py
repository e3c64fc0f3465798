"""Acceptance length of speculative decoding, as a metric of `evaluate`.

Stands alone: it needs `evaluate` and `datasets`, and nothing of the package it is shipped with.
"""

import datasets
import evaluate


_DESCRIPTION = """
Acceptance length τ of speculative decoding: tokens committed per verification, the recovered or bonus token counted,
over all texts together. A text's first token comes from the prefill and counts in neither.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[list[int]]`): By text, how many proposals each block's verification accepted, in order. With the
        configuration "blocks" a `list[list[dict]]`: each block as `{"anchor": ..., "num_accepted": ...}`, where the
        anchor is the position of the last committed token when the block was drafted; any choice of blocks will do.
    references (`list[int]`): By text, tokens of the completion, stop token included. With "blocks" the text's end,
        counted as anchors are: if they count from the completion's start, its length.
    num_draft_tokens (`int`, *optional*): Proposals a block; adds `acceptance_by_slot`.
Returns:
    `dict`: `acceptance_length`; `acceptance_length_per_text`, the mean of the texts' own; `committed` tokens and
    `verifications`, whose ratio τ is; with `num_draft_tokens` also `acceptance_by_slot`, the share of blocks whose
    first k proposals were all accepted, of those with k proposals inside the text.
Examples:
    >>> metric = evaluate.load("acceptance_length")
    >>> metric.compute(predictions=[[1, 0, 3, 1], [1]], references=[9, 2])["acceptance_length"]
    1.8
"""


class AcceptanceLength(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in ("default", "blocks"):
            raise ValueError(f"There is no configuration {self.config_name!r}: take 'blocks', or none.")
        count = datasets.Value("int64")
        block = {"anchor": count, "num_accepted": count} if self.config_name == "blocks" else count
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(block), "references": count}),
        )

    def _compute(self, predictions, references, num_draft_tokens=None):
        committed, verifications = [], []
        accepted_by_slot, valid_by_slot = [0] * (num_draft_tokens or 0), [0] * (num_draft_tokens or 0)
        for index, (text, length) in enumerate(zip(predictions, references, strict=True)):
            blocks = self._blocks(index, text, length)
            # The token after the accepted run, unless the text ended with the run.
            committed.append(sum(min(accepted + 1, length - 1 - anchor) for anchor, accepted in blocks))
            verifications.append(len(blocks))
            for slot in range(num_draft_tokens or 0):
                accepted_by_slot[slot] += sum(accepted > slot for _, accepted in blocks)
                valid_by_slot[slot] += sum(length - 1 - anchor > slot for anchor, _ in blocks)
        own = [tokens / blocks for tokens, blocks in zip(committed, verifications, strict=True) if blocks]
        result = {
            "acceptance_length": sum(committed) / max(sum(verifications), 1),
            "acceptance_length_per_text": sum(own) / max(len(own), 1),
            "committed": sum(committed),
            "verifications": sum(verifications),
        }
        if num_draft_tokens:
            shares = zip(accepted_by_slot, valid_by_slot, strict=True)
            result["acceptance_by_slot"] = [accepted / max(valid, 1) for accepted, valid in shares]
        return result

    def _blocks(self, index, text, length):
        """`(anchor, accepted)` of each block; a run reaches the text's end at most."""
        if self.config_name == "blocks":
            blocks = [(block["anchor"], block["num_accepted"]) for block in text]
        else:
            blocks, anchor = [], 0
            for accepted in text:
                blocks.append((anchor, accepted))
                anchor += accepted + 1
            # Only the last run may end the text without a token after it.
            if anchor not in (length - 1, length) or (not text and length != 1):
                raise ValueError(
                    f"Text {index} has {length} tokens, but its accepted runs {text} make {anchor + 1}, or {anchor} "
                    "if the last run ended it. `references` counts completion tokens, first and stop token included."
                )
        for anchor, accepted in blocks:
            if not 0 <= accepted <= length - 1 - anchor:
                raise ValueError(
                    f"Text {index}: a block at {anchor} cannot accept {accepted} in a text that ends at {length}."
                )
        return blocks
