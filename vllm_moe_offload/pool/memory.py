"""Slots in host memory: on the CPU platform this is the fast tier, and kernels read it in place."""

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ..store.layout import RecordLayout
from .huge_pages import HUGE_PAGE_BYTES


class HostMemory:
    """``slots`` records taken apart: per component of the layout one contiguous uint8 array ``[slots, nbytes]``.

    CPU kernels accept a strided first dimension but then compute wrong numbers, hence one dense array per component.
    Every array starts on a page, so a slot whose component size is a multiple of the disk's block can be read into
    directly. Pages are taken from the system when a slot is first written: huge ones where the system has them, since
    an O_DIRECT read pins the pages it writes to one by one.
    """

    def __init__(self, layout: RecordLayout, slots: int):
        self.layout = layout
        self.slots = slots
        self.components = tuple(_on_huge_pages(slots, part.nbytes) for part in layout.components)

    def slot(self, index: int) -> list[NDArray[np.uint8]]:
        """The writable bytes of slot ``index``, one array per component."""
        return [component[index] for component in self.components]


def _on_huge_pages(slots: int, nbytes: int) -> NDArray[np.uint8]:
    """Private memory that starts on a huge page. It ends where its bytes do, so it never takes more than these."""
    size = slots * nbytes
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -np.frombuffer(memory, dtype=np.uint8).ctypes.data % HUGE_PAGE_BYTES
    if size:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    return np.frombuffer(memory, dtype=np.uint8, count=size, offset=start).reshape(slots, nbytes)
