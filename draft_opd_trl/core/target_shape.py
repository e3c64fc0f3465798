"""What a target's config tells: its sizes, and how speculation can be exact over it. Needs none of its weights."""

from __future__ import annotations

from transformers import PreTrainedConfig

from .errors import InputError


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """
    The config of the language model in a config, which may be the whole.

    Raises:
        `ValueError`: There are several.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise InputError(
            f"A config of type {config.model_type} holds several language models, an encoder's and a decoder's, so it "
            "is no causal language model that reads tokens alone. Use another target."
        ) from error


class TargetShape:
    """
    A target without weights, for checks that need none.

    Args:
        config ([`~transformers.PreTrainedConfig`]): The target's.

    Raises:
        `ValueError`: It holds several language models.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = text_config(config)
        self.name: str = config._name_or_path
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        self.num_layers: int = self.config.num_hidden_layers
        self.architectures: list[str] = config.architectures or []
        self.layer_types: set[str] = set(getattr(self.config, "layer_types", None) or ())
        # Hybrid models take one mask per layer type in a dict; uniform ones (Llama) refuse a dict.
        self.hybrid = "sliding_attention" in self.layer_types
        windowed = self.hybrid or not self.layer_types
        self.window: int | None = getattr(self.config, "sliding_window", None) if windowed else None

    @property
    def context_length(self) -> int | None:
        """Positions that the target knows, as far as its RoPE is stretched; `None` if it does not say."""
        known = getattr(self.config, "max_position_embeddings", None)
        rope = getattr(self.config, "rope_parameters", None) or {}
        if known is not None and rope.get("rope_type") in ("linear", "yarn"):
            known = max(known, int(rope.get("original_max_position_embeddings", known) * rope["factor"]))
        return known

    @property
    def no_cache_because(self) -> str | None:
        """
        Why a cache with a place for each position cannot be exact over this target, as far as its config tells; `None`
        where it may be.
        """
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            return f"attn_implementation={implementation!r} does not take the masks of ragged batches"
        others = self.layer_types - {"full_attention", "sliding_attention"}
        if others:
            return f"layers of type {', '.join(sorted(others))} do not keep a key for each position"
        return None

    def check_exact(self) -> None:
        """
        Raises:
            `ValueError`: RoPE is of a sort over which speculation would change texts.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        # One for all layers, or one a layer type.
        parts = [part for part in (rope, *rope.values()) if isinstance(part, dict)]
        changing = {kind for part in parts if (kind := part.get("rope_type")) in ("dynamic", "longrope")}
        if changing:
            raise InputError(
                f"The target's RoPE is of type {' and '.join(sorted(changing))}, whose frequencies depend on the "
                "longest text of a batch. Keys in the cache keep the old ones, so speculation would change texts, and "
                "replay would not be speculation. Use a target whose rope_type is default, linear, llama3 or yarn."
            )
