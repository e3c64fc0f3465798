"""A device that is none: real CPU tensors that say they are elsewhere, so that code meets what it would meet on a GPU.

Under [`PretendDevice`] a tensor made on [`DEVICE`], or moved there, keeps its data and says that it is there. What a
GPU would refuse raises: an operation on tensors of both devices (a single CPU number is allowed, and so is a copy), a
generator of the other device. What makes the host wait for a GPU is counted. Code, loops and gradients run as they do.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import draft_opd_trl


# A device type of PyTorch's that nothing here has, and whose gradients are computed where those of the CPU are.
DEVICE = torch.device("lazy")
PACKAGE = str(Path(draft_opd_trl.__file__).parent)
aten = torch.ops.aten
# What answers the host, or needs an answer of the device to know how much it gives.
WAITING = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
COPYING = {aten._to_copy.default, aten.copy_.default}


class OnDevice(torch.Tensor):
    """A CPU tensor, `held`, that says it is on [`DEVICE`]."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnDevice({self.held})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            PretendDevice.now.wait("tolist")
            return args[0].held.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendDevice.now.run(func, args, kwargs or {})


def _is_there(value):
    return isinstance(value, OnDevice)


class PretendDevice(TorchDispatchMode):
    """
    Attributes:
        waits (`collections.Counter`): How often the host waited, by the function of the package that made it; by
            the operation, where none did.
    """

    now: PretendDevice | None = None

    def __enter__(self):
        PretendDevice.now, self.waits = self, Counter()
        enabled = torch.is_autocast_enabled
        self._patch = patch.object(
            torch, "is_autocast_enabled", lambda kind="cuda": kind != DEVICE.type and enabled(kind)
        )
        self._patch.start()
        # So that `torch.tensor(..., device=...)` is a copy that is seen here.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        self._patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def wait(self, name):
        frame = sys._getframe()
        while frame is not None:
            path, function = frame.f_code.co_filename, frame.f_code.co_name
            if path.startswith(PACKAGE) and not function.startswith("<"):
                name = f"{path.rpartition('/')[2]}:{function}"
                break
            frame = frame.f_back
        self.waits[name] += 1

    def run(self, func, args, kwargs):
        leaves = tree_leaves((args, kwargs))
        there = [leaf for leaf in leaves if _is_there(leaf)]
        wanted = kwargs.get("device")
        wanted = None if wanted is None else torch.device(torch.device(wanted).type)
        if not there and wanted != DEVICE:
            return func(*args, **kwargs)
        self._refuse(func, leaves, kwargs)
        self._count(func, args, there, wanted)
        if wanted == DEVICE:
            kwargs = {**kwargs, "device": "cpu"}
        inner_args, inner_kwargs = tree_map(lambda x: x.held if _is_there(x) else x, (args, kwargs))
        output = func(*inner_args, **inner_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if wanted is not None and wanted != DEVICE:
            return output
        wrapped = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, output)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped

    def _refuse(self, func, leaves, kwargs):
        here = [x for x in leaves if isinstance(x, torch.Tensor) and not _is_there(x) and x.dim() > 0]
        if here and func not in COPYING:
            raise RuntimeError(f"{func}: tensors on both devices, a CPU one of shape {tuple(here[0].shape)}")
        generators = [x for x in leaves if isinstance(x, torch.Generator)]
        if generators:
            raise RuntimeError(f"{func}: a generator of the CPU")

    def _count(self, func, args, there, wanted):
        masks = func in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # A copy waits in both directions: what the host has is not pinned.
        copied = func is aten._to_copy.default and wanted is not None and _is_there(args[0]) != (wanted == DEVICE)
        copied |= func is aten.copy_.default and _is_there(args[0]) != _is_there(args[1]) and args[1].dim() > 0
        if func in WAITING or masks or copied:
            self.wait(str(func))


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers there, in place; those that modules share stay shared."""
    moved = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                there = moved.get(parameter)
                if there is None:
                    there = moved[parameter] = nn.Parameter(OnDevice(parameter.data), parameter.requires_grad)
                part._parameters[name] = there
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
    return module


@contextmanager
def refused(why: str):
    """Inside, something must be refused."""
    try:
        yield
    except RuntimeError as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"nothing was refused for {why!r}")
