"""What both engine drivers need; runs inside an engine's environment, where draft_opd_trl is not installed.

For each job a driver has the engine's own code parse the folder's config, build the draft model and load the weights
into parameters that were filled with NaN. Then it drafts one block, and writes what it found. Attention kernels and
cache are replaced by `CachedAttention`.
"""

import importlib.machinery
import sys
import traceback
import types

import torch
from torch import nn


class _Stub(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _StubFinder:
    """Stands in for packages that are imported on the way and not used: kernels, grammars."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def stub(*names):
    sys.meta_path.append(_StubFinder(*names))
    # torchvision's build for CUDA does not load its operators on a CPU, and then fails to describe these two.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


class CachedAttention(nn.Module):
    """One text's attention with a growing cache; both engines build their layers with these arguments."""

    def __init__(self, num_heads, head_dim, scaling, num_kv_heads=None, **options):
        super().__init__()
        self.shape, self.scaling = (num_heads, head_dim), scaling
        self.kv_shape = (num_kv_heads or num_heads, head_dim)
        self.causal = True
        self.keys, self.values = [], []
        self.layer_name, self.kv_cache = options.get("prefix"), None
        self.attn_type = options.get("attn_type")

    @property
    def impl(self):
        return self

    def append(self, keys, values):
        self.keys.append(keys.reshape(-1, *self.kv_shape))
        self.values.append(values.reshape(-1, *self.kv_shape))

    def do_kv_cache_update(self, layer, keys, values, cache, slots):
        self.append(keys, values)

    def forward(self, queries, keys, values, *batch, **options):
        self.append(keys, values)
        queries = queries.reshape(-1, *self.shape)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        mask = torch.ones(len(queries), len(keys), dtype=torch.bool)
        if self.causal:
            mask = mask.tril(len(keys) - len(queries))
        attended = nn.functional.scaled_dot_product_attention(
            *(states.transpose(0, 1)[None] for states in (queries, keys, values)),
            attn_mask=mask,
            scale=self.scaling,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1).flatten(1)


def fill_with_nan(model):
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(float("nan"))


def left_unset(model):
    return sorted(
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not bool(parameter.isfinite().all())
    )


def features(job, taps):
    """Tapped states `(T, F)`; `hidden_states[i]` is what both engines capture before they run layer i."""
    empty = job["hidden_states"][0][:, :0]
    return torch.cat([empty, *(job["hidden_states"][tap] for tap in taps)], dim=-1)


def masked(anchor, mask, size):
    """The tokens of a block before it is filled."""
    return torch.cat([anchor[None], anchor.new_full((size - 1,), mask)])


def main(draft):
    """Drafts every job of the file JOBS; one that raises has its traceback for a result."""
    results = {}
    for name, job in torch.load(sys.argv[1]).items():
        torch.set_default_dtype(getattr(torch, job["dtype"]))
        try:
            with torch.no_grad():
                results[name] = draft(job)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    torch.save(results, sys.argv[2])
