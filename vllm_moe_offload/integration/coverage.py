"""Which elements of a layer's expert tensors have been written, and what the checkpoint never brought.

vLLM leaves an element that nothing was loaded into as the memory happened to be. A layer like that must never become
records.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

Box = tuple[tuple[int, int], ...]
"""A block of a tensor: per dimension the first index and the one after the last."""

_WHOLE_TARGET = frozenset({"copy_", "fill_", "zero_"})
"""In-place operations that write every element of what they are called on."""


class WrittenParts(TorchDispatchMode):
    """While active, notes which parts of ``tensors`` are written, through whatever view. The tensors may be meta."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self._tensors = {_storage(tensor): (name, tensor) for name, tensor in tensors.items()}
        self.parts: list[tuple[str, Box | None]] = []
        """Name and block of each write, in order; None for a write that is no block or not certainly a whole one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        declared = func._schema.arguments
        if declared and declared[0].alias_info is not None and declared[0].alias_info.is_write:
            target = args[0]
            found = self._tensors.get(_storage(target)) if isinstance(target, torch.Tensor) else None
            if found is not None and target.numel():
                name, whole = found
                block = block_of(target, whole) if func.overloadpacket.__name__ in _WHOLE_TARGET else None
                self.parts.append((name, block))
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def block_of(view: torch.Tensor, whole: torch.Tensor) -> Box | None:
    """The block of ``whole``, a dense tensor, that ``view`` shows; None if it shows something else."""
    sizes = {stride: size for size, stride in zip(view.size(), view.stride(), strict=True) if size > 1}
    offset = view.storage_offset() - whole.storage_offset()
    block = [(0, 1)] * whole.dim()
    wide = [dim for dim in range(whole.dim()) if whole.size(dim) > 1]
    for dim in sorted(wide, key=lambda dim: -whole.stride(dim)):
        start, offset = divmod(offset, whole.stride(dim))
        block[dim] = (start, start + sizes.pop(whole.stride(dim), 1))
        if block[dim][1] > whole.size(dim):
            return None
    return None if sizes or offset else tuple(block)


def volume(boxes: set[Box]) -> int:
    """Elements in the union of ``boxes``: their edges cut it into cells, each of which is covered or not."""
    if len(boxes) == 1:
        return math.prod(stop - start for start, stop in next(iter(boxes)))
    edges = [np.unique([box[dim] for box in boxes]) for dim in range(len(next(iter(boxes))))]
    covered = np.zeros([len(cuts) - 1 for cuts in edges], dtype=bool)
    for box in boxes:
        covered[tuple(slice(*np.searchsorted(cuts, ends)) for cuts, ends in zip(edges, box, strict=True))] = True
    cells = np.ones((), dtype=np.int64)
    for cuts in edges:
        cells = np.multiply.outer(cells, np.diff(cuts))
    return int(cells[covered].sum())


class Coverage:
    """How much of each expert's part of each of a layer's tensors has been written.

    Args:
        tensors: ``[experts, …]`` each, by name; only their shapes are read, and how many elements vLLM loads into one
            whose other elements are padding.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._wanted = {
            name: getattr(tensor, "weight_loader_numel", tensor.numel()) for name, tensor in tensors.items()
        }
        self._boxes: dict[str, list[set[Box]]] = {
            name: [set() for _ in range(tensor.shape[0])] for name, tensor in tensors.items()
        }
        self._elements: dict[str, NDArray[np.int64]] = {
            name: np.zeros(tensor.shape[0], dtype=np.int64) for name, tensor in tensors.items()
        }
        self._outstanding = sum(self._wanted.values())

    def add(self, name: str, block: Box | None) -> None:
        """Part ``block`` of a tensor has been written. Of an unknown part (None) nothing is taken for written."""
        if block is None:
            return
        (first, stop), *within = block
        for expert in range(first, stop):
            boxes = self._boxes[name][expert]
            if (part := tuple(within)) not in boxes:
                boxes.add(part)
                before, now = self._elements[name][expert], volume(boxes)
                self._elements[name][expert] = now
                self._outstanding -= int(now - before)

    @property
    def complete(self) -> bool:
        """Every element that vLLM loads has been written at least once."""
        return self._outstanding <= 0

    def partial(self, name: str) -> bool:
        """Whether elements of a tensor are missing that may or may not be padding."""
        return int(self._elements[name].sum()) < self._wanted[name]

    def lacking(self, name: str) -> list[int]:
        """Experts of which less has been written than of others: padding is the same for all."""
        elements = self._elements[name]
        return np.flatnonzero(elements < elements.max()).tolist()
