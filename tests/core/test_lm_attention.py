"""Causal LMs under our masks: no keys are copied for the heads that share them, and nothing else changes."""

import pytest
import torch
from conftest import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from draft_opd_trl.core import lm_attention
from draft_opd_trl.core.lm_attention import NAME, shared_keys
from draft_opd_trl.core.target import Target


SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Kernels(TorchDispatchMode):
    """Heads of the keys that fused attention is given."""

    def __enter__(self):
        self.heads = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is SDPA:
            self.heads.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def read(target, tokens):
    return target.forward_text(tokens, (0, 1), target.new_cache(*tokens.shape))


def test_a_masked_forward_says_what_it_said_without_copies(target):
    tokens = torch.arange(1, 23).reshape(2, 11)
    with Kernels() as kernels:
        got = read(target, tokens)
    layers, kv_heads = target.num_layers, target.config.num_key_value_heads
    assert kernels.heads == [kv_heads] * layers and kv_heads < target.config.num_attention_heads
    plain = Target(type(target.model)(target.model.config))
    plain.model.load_state_dict(target.model.state_dict())
    plain.decoder._supports_attention_backend = False  # so that transformers' own is used
    with Kernels() as kernels:
        expected = read(plain, tokens)
    assert kernels.heads == [target.config.num_attention_heads] * layers
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(implementation):
    decoder = tiny_model("qwen3", attn_implementation=implementation).model
    with torch.enable_grad(), shared_keys(decoder):  # where layers may be run again, outside
        assert decoder.config._attn_implementation == implementation
    with torch.no_grad(), pytest.raises(ZeroDivisionError), shared_keys(decoder):
        assert decoder.config._attn_implementation == (NAME if implementation == "sdpa" else implementation)
        raise ZeroDivisionError
    assert decoder.config._attn_implementation == implementation


@pytest.mark.parametrize("more", [{}, {"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}])
def test_what_asks_for_more_is_left_to_transformers(monkeypatch, more):
    asked = []
    monkeypatch.setattr(lm_attention, "sdpa_attention_forward", lambda *args, **kwargs: asked.append(kwargs))
    queries, keys = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 5, 8)
    lm_attention._attend(None, queries, keys, keys, torch.ones(1, 1, 3, 5, dtype=torch.bool), **more)
    assert bool(asked) == bool(more)
    lm_attention._attend(None, queries, keys, keys, None, **more)
    assert len(asked) == 1 + bool(more)
