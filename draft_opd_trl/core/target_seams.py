"""Where a causal LM keeps what is read of it, and whether tokens can be taken back from its cache: that is tried."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import PositionCache
from .errors import InputError


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """What turns tokens into states before the head; some models call something else their decoder."""
    found = model.get_decoder()
    if found is model or isinstance(found, torch.nn.Linear):
        return getattr(model, "model", model.base_model)
    return found


def logit_scale(config: Any) -> float:
    """What raw head outputs are multiplied by (Cohere's `logit_scale`, Granite's `logits_scaling`)."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)


@torch.no_grad()
def cache_fault(target: Any) -> str | None:
    """
    Why tokens cannot be taken back and overwritten in a [`PositionCache`] over a target, tried on a few.

    Args:
        target ([`Target`]): In the making: its forwards work.

    Raises:
        `ValueError`: Later tokens change what is said of earlier ones.
    """
    text = torch.arange(8, device=target.device)[None] % target.vocab_size
    expected = target.forward_text(text, ())[1]
    # What the first half of the text does to the second: an error of the cache is of that order.
    effect = (target.forward_text(text[:, 4:], ())[1] - expected[:, 4:]).abs().max().item()
    rounding = 1e-5 if target.dtype == torch.float32 and not target.quantized else 2e-2
    slack = max(rounding * expected.abs().max().item(), effect / 20)
    if not torch.allclose(target.forward_text(text[:, :4], ())[1], expected[:, :4], rtol=0, atol=slack):
        raise InputError(
            f"{type(target.model).__name__} says something else of a token when others follow it, so it is no decoder "
            "that reads from left to right. Use a causal language model."
        )
    places = torch.arange(8, device=target.device)[None]
    cache = PositionCache(target.num_layers, 1, 8)
    try:
        target.forward_cached(text[:, :4], places[:, :4], cache, 4)
        target.forward_cached(text.flip(1)[:, :3], places[:, 4:7], cache, 7)
        got = target.forward_cached(text[:, 4:], places[:, 4:], cache, 8)[1]
    except Exception as error:  # whatever a model does with a cache that is not its own
        return f"its layers do not take a cache with a place for each position ({type(error).__name__})"
    if torch.allclose(got, expected[:, 4:], rtol=0, atol=slack):
        return None
    return "its layers keep a state that tokens cannot be taken out of"
