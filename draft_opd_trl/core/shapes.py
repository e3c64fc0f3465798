"""Running code for its sizes: tensors that have shapes and no data, and the count of bytes alive meanwhile.

Knows no models, and nothing of training.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


aten = torch.ops.aten
# Cells of a tensor up to which whole numbers have values. Larger ones are attention masks and sorted vocabularies.
SMALL = 2**22


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; what several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """
    Counts the bytes of tensors made under it that are still alive, and their peak.

    Args:
        held (`Iterable[torch.Tensor]`, *optional*): Tensors that are there already and do not count.
    """

    def __init__(self, held: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = self.run(func, args, kwargs or {})
        for tensor in _tensors(output):
            self._note(tensor.untyped_storage())
        return output

    def begin(self) -> int:
        """Bytes alive now, from which the peak is counted anew."""
        self.peak = self.live
        return self.live

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What the operation gives."""
        return func(*args, **kwargs)

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


class _Mode(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> _Mode:
        # Copying a module (PEFT does) would copy the mode that each tensor belongs to, and memory would be corrupted.
        return self


class Shapes(LiveBytes):
    """
    [`LiveBytes`] under which numbers with a fraction have no data, and whole numbers and conditions do.

    So lengths, anchors and masks lead the code where they would lead it, into loops, indices and sizes, while weights,
    states and logits cost nothing. What is asked of those has one answer: conditions hold, whole numbers are 0, others
    are 1. A drafter's argmax is then the target's, and both are token 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = _Mode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = _tensors((args, kwargs))
        in_place_or_view = any(value.alias_info is not None for value in func._schema.returns)
        if not any(isinstance(tensor, FakeTensor) for tensor in given):
            return func(*args, **kwargs) if in_place_or_view else self._run_real(func, args, kwargs, given)
        if func is aten._local_scalar_dense.default:
            return 1
        if func in (aten.equal.default, aten.allclose.default):
            return True
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            args = (args[0], [part for index in args[1] for part in _without_masks(index)], *args[2:])
        with self.fake:
            output = func(*args, **kwargs)
        if in_place_or_view:
            # What is written to keeps the values it has.
            written = kwargs.get("out", given[0])
            return written if func._schema.is_mutable and isinstance(output, torch.Tensor) else output
        return tree_map(_answer, output)

    def _run_real(self, func: Any, args: Any, kwargs: dict[str, Any], given: list[torch.Tensor]) -> Any:
        try:
            with self.fake:
                output = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        # Numbers with a fraction that nobody gave and nobody draws are weights and states, but for a single one.
        few = SMALL if given or kwargs.get("generator") is not None else 1
        limits = {tensor: few if tensor.is_floating_point() else SMALL for tensor in _tensors(output)}
        if any(tensor.numel() > limit for tensor, limit in limits.items()):
            return output
        return func(*args, **kwargs)


def _without_masks(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the indices of its cells; where they are many, of all of them."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if isinstance(index, FakeTensor):
        return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
    return list(index.nonzero(as_tuple=True))


def _answer(value: Any) -> Any:
    if not isinstance(value, FakeTensor) or value.is_floating_point() or value.numel() > SMALL:
        return value
    return torch.full(value.shape, value.dtype == torch.bool, dtype=value.dtype)
