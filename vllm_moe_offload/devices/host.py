"""Slots in host memory: on the CPU platform this is the fast tier, and kernels read it in place."""

import mmap

import numpy as np
from numpy.typing import NDArray

from ..store.layout import RecordLayout


class HostPool:
    """``slots`` records taken apart: per component of the layout one contiguous uint8 array ``[slots, nbytes]``.

    CPU kernels accept a strided first dimension but then compute wrong numbers, hence one dense array per component.
    Every array starts on a page, so a slot whose component size is a multiple of the disk's block can be read into
    directly. Pages are taken from the system when a slot is first written.
    """

    def __init__(self, layout: RecordLayout, slots: int):
        self.layout = layout
        self.slots = slots
        self.components = tuple(_page_aligned(slots, part.nbytes) for part in layout.components)

    def slot(self, index: int) -> list[NDArray[np.uint8]]:
        """The writable bytes of slot ``index``, one array per component."""
        return [component[index] for component in self.components]


def _page_aligned(slots: int, nbytes: int) -> NDArray[np.uint8]:
    """Private memory without huge pages: the kernel's collapsing of them took a third of decoding speed (measured)."""
    size = slots * nbytes
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype=np.uint8, count=size).reshape(slots, nbytes)
