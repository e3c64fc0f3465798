"""Where a causal LM keeps what is read of it, and what is exact over it: that is tried."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .cache import PositionCache
from .errors import InputError
from .kept_states import KeptStates


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM that a multimodal model holds whole (Llama 4) and calls in its own way; else the model."""
    inside = model.get_decoder()
    if inside is model or not isinstance(inside, PreTrainedModel) or inside.get_output_embeddings() is None:
        return model
    # What the whole was loaded with.
    for name in ("generation_config", "hf_device_map", "hf_quantizer"):
        if getattr(model, name, None) is not None:
            setattr(inside, name, getattr(model, name))
    return inside


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """What turns tokens into states before the head; some models call something else their decoder."""
    found = model.get_decoder()
    if found is model or isinstance(found, torch.nn.Linear):
        return getattr(model, "model", model.base_model)
    return found


def logit_scale(config: Any) -> float:
    """What raw head outputs are multiplied by (Cohere's `logit_scale`), or the inverse of what they are divided by."""
    divisors = (getattr(config, name, None) for name in ("logits_scaling", "logits_mup_width_multiplier"))
    return getattr(config, "logit_scale", None) or 1 / next((divisor for divisor in divisors if divisor), 1)


def before_head(model: PreTrainedModel) -> torch.nn.Module | None:
    """What a model does to its decoder's states before its head, if it has a module for that (ModernBERT's)."""
    found = getattr(model, "lm_head", None)
    return None if found is None or model.get_output_embeddings() in found.modules() else found


def check_whole_weights(target: Any) -> None:
    """
    Raises:
        `ValueError`: A target has no head, or its head or embedding is quantised.
    """
    if target.head is None:
        raise InputError(
            f"{type(target.model).__name__} has no head that says which token comes next. Give the whole causal "
            "language model, as AutoModelForCausalLM loads it."
        )
    for module in (target.head, target.embedding):
        weight = getattr(module, "weight", None)
        if weight is None or not weight.is_floating_point():
            raise InputError(
                f"The target's {'head' if module is target.head else 'embedding'} is quantised "
                f"({type(module).__name__}), and drafters and losses read its plain weight. Leave it out of the "
                "quantisation, as is the default: BitsAndBytesConfig(llm_int8_skip_modules=['lm_head'])."
            )


@torch.no_grad()
def check_head(target: Any) -> None:
    """
    Raises:
        `ValueError`: A target does not read tokens alone, its layers cannot be tapped, or its logits are not what its
            states give.
    """
    probe = torch.arange(2, device=target.device)[None]
    try:
        kept = target.decoder(input_ids=probe, output_hidden_states=True, use_cache=False).hidden_states
        states = target.forward_text(probe, ())[1]
        expected = target.model(input_ids=probe, use_cache=False).logits.float()
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # whatever a model misses beside tokens
        raise InputError(
            f"{type(target.model).__name__} does not read two tokens alone ({type(error).__name__}: {error}). Give "
            "the path of its folder, of which the text model is loaded where there is one, or another target."
        ) from error
    if kept[1].shape != (1, 2, target.hidden_size):
        raise InputError(
            f"{type(target.model).__name__} keeps states of shape {tuple(kept[1].shape)} for two tokens, where "
            f"drafters read (1, 2, {target.hidden_size}). Its layers cannot be tapped; use another target."
        )
    if len(kept) <= target.num_layers:
        raise InputError(
            f"{type(target.model).__name__} counts {target.num_layers} layers, but keeps the states of "
            f"{len(kept) - 1}: those that drafters tap by number are not there. Use another target."
        )
    got = target.logits(states)
    if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item()):
        raise InputError(
            f"{type(target.model).__name__} post-processes its logits beyond a scale and a soft cap (largest "
            f"difference {(got - expected).abs().max().item():.3g}); its distribution cannot be rebuilt from "
            "hidden states."
        )


def _slack(target: Any, text: torch.Tensor, expected: torch.Tensor) -> float:
    """How far states may be from `expected` by rounding: an error of the cache is of the order of what it holds."""
    middle = text.shape[1] // 2
    effect = (target.forward_text(text[:, middle:], ())[1] - expected[:, middle:]).abs().max().item()
    rounding = 1e-5 if target.dtype == torch.float32 and not target.quantized else 2e-2
    return max(rounding * expected.abs().max().item(), effect / 20)


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
    slack = _slack(target, text, expected)
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


@torch.no_grad()
def kept_fault(target: Any) -> str | None:
    """
    Why the states of a model's own cache cannot be kept and gone on from ([`KeptStates`]), tried on three texts that
    advance by different lengths, past a rejected token, one of them replaced by another text.

    Args:
        target ([`Target`]): In the making: its forwards work, and no cache of positions is exact over it.

    Returns:
        `str`, *optional*: The reason, with that of `target.no_places`.
    """
    texts = torch.arange(30, device=target.device).view(3, 10) % target.vocab_size
    expected = target.forward_text(texts, ())[1]
    slack = _slack(target, texts, expected)
    rows = torch.arange(3, device=target.device)[:, None]
    store = KeptStates(3, 10, target.device)

    def differs(starts: list[int], width: int, rejected: bool = False) -> bool:
        places = torch.tensor(starts, device=rows.device)[:, None] + torch.arange(width, device=rows.device)
        block = texts[rows, places]
        if rejected:
            block[:, -1] = (block[:, -1] + 1) % target.vocab_size
        got = target.forward_cached(block, places, store, 10)[1]
        right = width - rejected
        return not torch.allclose(got[:, :right], expected[rows, places][:, :right], rtol=0, atol=slack)

    try:
        rounds = [([0, 0, 0], 4), ([2, 3, 4], 3, True), ([3, 5, 6], 2), ([5, 7, 8], 2), ([0, 8, 9], 1), ([1, 9, 9], 1)]
        if any([differs(*round_) for round_ in rounds]):
            return f"{target.no_places}, and a text read in parts by its own cache is not that text read at once"
    except Exception as error:  # whatever a model does with its cache
        return f"{target.no_places}, and its own cache cannot be gone on from ({type(error).__name__})"
    return None
