"""Who writes the texts of an evaluation by replay: a server of the target, each text read by the target first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..core.records import Rollout
    from ..core.target import Target
    from ..decoding.speculation import SpeculationSettings


class ServerTexts:
    """
    Texts of a server, kept on disk under the law they follow, so that all drafters are judged along the same.

    Args:
        target ([`Target`]): Reads every text before it is trusted, and writes those that were dropped.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its own.
        settings ([`SpeculationSettings`]): Distribution and lengths.
        folder (`Path`): Where texts are kept.
        options (`Any`): With `server_url`, `server_model`, `server_token` and `seed`.
        chat_template_kwargs (`dict`): What prompts were made with.

    Attributes:
        counts (`Counter`): Texts asked for, as `asked`, and those of them that the target wrote, as `dropped`.
    """

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        settings: SpeculationSettings,
        folder: Path,
        options: Any,
        chat_template_kwargs: dict[str, Any],
    ) -> None:
        from ..training.config import DraftOPDConfig
        from ..training.rollout import build_source

        law = settings.sampling
        config = DraftOPDConfig(
            str(folder),
            rollout_source="server",
            server_url=options.server_url,
            server_model=options.server_model,
            server_token=options.server_token,
            temperature=law.temperature,
            top_k=law.top_k,
            top_p=law.top_p,
            seed=options.seed,
            max_completion_length=settings.max_new_tokens,
            chat_template_kwargs=chat_template_kwargs,
            report_to="none",
        )
        self.counts: Counter[str] = Counter(asked=0, dropped=0)
        self.source = build_source(config, target, None, tokenizer, settings, self._count, progress=True)

    def _count(self, name: str, part: int, whole: int) -> None:
        if name == "rollout/dropped":
            self.counts.update(asked=whole, dropped=part)

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Rollout:
        """Texts by prompt, see [`measure_by_replay`]. A drawn text depends on its prompt and the run's seed."""
        return self.source.write([{"prompt_ids": list(prompt)} for prompt in prompts])
