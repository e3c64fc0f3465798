"""Attention under a mask: against the dense reference, and against what fused kernels ask for."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from draft_opd_trl.core import attention
from draft_opd_trl.core.attention import attend, attend_densely, mask_for


# heads, kv_heads, Q, S: fewer rows than keys are wide and more, one head a key and several, odd and even lengths.
SHAPES = [(4, 2, 5, 9), (4, 4, 5, 9), (6, 2, 40, 51), (6, 1, 17, 16), (4, 2, 1, 1)]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
HEAD_DIM = 8


def problem(heads, kv_heads, rows, keys, dtype=torch.float32, requires_grad=True):
    draws = torch.Generator().manual_seed(0)
    shapes = [(3, rows, heads), (3, keys, kv_heads), (3, keys, kv_heads)]
    parts = [torch.randn((*shape, HEAD_DIM), generator=draws).to(dtype).transpose(1, 2) for shape in shapes]
    sees = torch.rand((3, 1, rows, keys), generator=draws) < 0.5
    sees[..., 0] = True
    return [part.requires_grad_(requires_grad) for part in parts], sees


def mask_of(sees, dtype, shape):
    return mask_for(sees, dtype, shape[0], shape[1], HEAD_DIM)


TOLERANCES = [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_values_and_gradients_are_the_reference_s(shape, dtype, tolerance):
    (queries, keys, values), sees = problem(*shape, dtype=dtype)
    found, gradients = [], []
    for attended in (
        attend(queries, keys, values, mask_of(sees, dtype, shape), 0.3),
        attend_densely(queries, keys, values, sees, 0.3),
    ):
        assert attended.shape == (3, shape[2], shape[0], HEAD_DIM) and attended.dtype == dtype
        found.append(attended)
        weights = torch.linspace(-1, 1, attended.numel()).view_as(attended)
        gradients.append(torch.autograd.grad((attended.float() * weights).sum(), (queries, keys, values)))
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2 * tolerance, atol=4 * tolerance)


def test_without_a_mask_every_key_takes_part():
    (queries, keys, values), sees = problem(6, 2, 5, 9)
    everything = attend_densely(queries, keys, values, torch.ones_like(sees))
    torch.testing.assert_close(attend(queries, keys, values, None), everything)


@pytest.mark.parametrize("rows", [1, 2 * 2 * HEAD_DIM, 2 * 2 * HEAD_DIM + 1])
def test_what_is_repeated_is_the_smaller(rows):
    """Rows of the mask for heads that share keys, or those keys and values."""
    mask = mask_of(torch.ones(1, 1, rows, 16, dtype=torch.bool), torch.float32, (6, 2))
    repeated_rows, repeated_keys = 3 * rows * 16, 2 * 16 * 6 * HEAD_DIM
    assert (mask.numel() > rows * 16) == (repeated_rows <= repeated_keys)


# -- what fused kernels ask for -------------------------------------------------------------------------------------


def refusals(queries, keys, values, mask, enable_gqa):
    """
    Why PyTorch 2.13's memory-efficient CUDA kernel would not take the arguments, or would copy the mask first.

    From `can_use_mem_efficient_attention` (sdp_utils.cpp: shapes, heads, head_dim, offsets, dtype), the checks in
    ATen/native/transformers/sdp_utils_cpp.h (last strides, no empty lengths) and `preprocess_mask` (attention.cpp:
    strides); for compute capability 8.0 and later.
    """
    parts, found = (queries, keys, values), []
    alignment = 16 // queries.element_size()
    checks = {
        "four dimensions": all(part.dim() == 4 for part in parts),
        "one dtype, of 32 or 16 bits": {part.dtype for part in parts}
        in [{torch.float32}, {torch.float16}, {torch.bfloat16}],
        "as many heads, whatever enable_gqa says": len({part.shape[1] for part in parts}) == 1,
        "one batch size": len({part.shape[0] for part in parts}) == 1,
        "no empty length": all(part.shape[2] for part in parts),
        "head_dim is aligned": all(part.shape[3] % alignment == 0 and part.shape[3] for part in parts),
        "offsets are aligned": all(part.storage_offset() % alignment == 0 for part in parts),
        "last dimensions are contiguous": all(part.stride(-1) == 1 for part in parts),
    }
    if mask is not None:
        sizes = (queries.shape[0], queries.shape[1], queries.shape[2], keys.shape[2])
        checks |= {
            "the mask's shape fits": all(own in (1, size) for own, size in zip(mask.shape, sizes, strict=True)),
            "the mask's last dimension is contiguous": mask.stride(-1) == 1,
            "the mask's rows are aligned, so that it is not padded": all(
                mask.stride(dim) % 8 == 0 for dim in range(mask.dim() - 1)
            ),
            "the mask is of numbers in the same dtype, so that it is not converted": mask.dtype == queries.dtype,
            "the mask has no gradient": not mask.requires_grad,
        }
    found += [name for name, holds in checks.items() if not holds]
    return found


@pytest.fixture
def calls(monkeypatch):
    """What the fused operator is given."""
    seen, operator = [], attention.scaled_dot_product_attention

    def listen(queries, keys, values, attn_mask=None, enable_gqa=False, **options):
        seen.append((queries, keys, values, attn_mask, enable_gqa))
        return operator(queries, keys, values, attn_mask=attn_mask, enable_gqa=enable_gqa, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", listen)
    return seen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_memory_efficient_kernel_would_take_it(shape, dtype, calls):
    (queries, keys, values), sees = problem(*shape, dtype=dtype)
    attend(queries, keys, values, mask_of(sees, dtype, shape))
    attend(queries, keys, values, None)
    assert [refusals(*call) for call in calls] == [[], []]


def test_the_kernel_s_wants_are_told_from_what_it_would_not_take():
    (queries, keys, values), sees = problem(4, 2, 5, 9)
    assert refusals(queries, keys, values, sees, True) == [
        "as many heads, whatever enable_gqa says",
        "the mask's rows are aligned, so that it is not padded",
        "the mask is of numbers in the same dtype, so that it is not converted",
    ]
    narrow = [part[..., 1:7] for part in (queries, queries, queries)]
    assert refusals(*narrow, None, False) == ["head_dim is aligned", "offsets are aligned"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_kernel_that_holds_scores_is_needed(shape):
    """On this device; with math ruled out PyTorch raises where no other takes it."""
    (queries, keys, values), sees = problem(*shape, requires_grad=False)
    with sdpa_kernel(FUSED):
        attend(queries, keys, values, mask_of(sees, torch.float32, shape))
    reason = "No viable backend"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]), pytest.raises(RuntimeError, match=reason):
        attend(queries, keys, values, mask_of(sees, torch.float32, shape))  # no such kernel on a CPU


def test_masked_keys_have_no_say_whatever_they_hold():
    (queries, keys, values), sees = problem(4, 2, 5, 9, requires_grad=False)
    sees[..., -1] = False
    before = attend(queries, keys, values, mask_of(sees, torch.float32, (4, 2)))
    keys[:, :, -1], values[:, :, -1] = 1e4, math.pi
    torch.testing.assert_close(attend(queries, keys, values, mask_of(sees, torch.float32, (4, 2))), before)
