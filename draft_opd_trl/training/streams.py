"""Which slots of a block teach, and how much: the two streams of Draft-OPD, weighed.

Pure tensor functions over [`DraftBlocks`]. Knows no models and no losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.checks import settle
from ..core.limits import LIMITS
from ..core.records import DraftBlocks


@dataclass(frozen=True)
class StreamSettings:
    """
    Which slots teach, and how much.

    Args:
        accepted_weight (`float`): λ of the accepted stream: text tokens up to and including the next anchor.
        rejected_weight (`float`): λ of the rejected stream: drafted tokens from the first rejected slot on.
        rejected_decay (`float`): γ; weight of the i-th rejected slot is `γ ** (i − 1)`.
        accepted_decay (`float`): Weight of slot k of the accepted stream is `accepted_decay ** (k − 1)`.
        sft_decay (`float`, *optional*): The same for blocks of random anchors (`lmbda < 1`); `None` leaves it to the
            drafter, whose own [`BatchMaker`] puts in.
        whole_blocks (`bool`): The accepted stream goes on behind the error position, to the end of the block; what
            it teaches there is the text, whatever was drafted.
    """

    accepted_weight: float = 1.0
    rejected_weight: float = 0.0
    rejected_decay: float = 0.8
    accepted_decay: float = 1.0
    sft_decay: float | None = 1.0
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        settle(self, LIMITS)

    @property
    def scores_rejected(self) -> bool:
        """Whether the target is asked what it says behind a rejected proposal: only the rejected stream reads it."""
        return self.rejected_weight > 0


def stream_weights(
    blocks: DraftBlocks, on_policy: torch.Tensor, streams: StreamSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights `(N, K)` of both streams, λ included (Draft-OPD, section 3).

    `on_policy` `(N,)` marks blocks drafted by the drafter; the rest are text blocks, whose slots are all accepted.
    """
    slots = torch.arange(blocks.num_draft_tokens, device=blocks.texts.device)
    accepted_until = torch.minimum(blocks.num_accepted + 1, blocks.num_valid)[:, None]
    if streams.whole_blocks:
        accepted_until = blocks.num_valid[:, None]
    decay = torch.where(on_policy, streams.accepted_decay, streams.sft_decay)[:, None]
    accepted = (slots < accepted_until) * decay**slots * torch.where(on_policy, streams.accepted_weight, 1.0)[:, None]
    behind = slots - blocks.num_accepted[:, None]
    in_rejected = (behind >= 0) & (blocks.has_error & on_policy)[:, None]
    rejected = torch.where(in_rejected, streams.rejected_weight * streams.rejected_decay ** behind.clamp(min=0), 0.0)
    return accepted.float(), rejected.float()


def dpace_weights(confidence: torch.Tensor, taught: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Weights of D-PACE (arXiv 2605.18810): Σ_{m ≥ j} Π_{i ≤ m} ((1 − α) q_i + α) for slot j, over the slots taught.

    What a slot's log-probability adds to the expected accepted run, where α is 0; α keeps late slots from vanishing.

    Args:
        confidence (`torch.Tensor` of shape `(N, K)`): q, the drafter's probability of each slot's token.
        taught (`torch.BoolTensor` of shape `(N, K)`): Slots of the stream, a leading run of each block.
        alpha (`float`): α.

    Returns:
        `torch.Tensor` of shape `(N, K)`, at most K; 0 where nothing is taught.
    """
    reached = ((1 - alpha) * confidence + alpha).cumprod(-1) * taught
    return reached.flip(-1).cumsum(-1).flip(-1)
