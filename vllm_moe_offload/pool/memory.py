"""Memory that the slots of a pool are made of: the contract, and host memory, which CPU kernels read in place.

It must never decide what goes where.
"""

import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..store.layout import RecordLayout
from .huge_pages import HUGE_PAGE_BYTES

if TYPE_CHECKING:
    import torch


class SlotMemory(ABC):
    """What a pool asks of the memory of its slots, whichever device the kernels that read it run on.

    A record is brought into a slot in three steps::

        parts = memory.targets(slot)
        ...  # the record is read into parts and compared with its checksum
        memory.commit(slot)

    *Pins.* The cache has pinned the slot before its load is queued, and it stays pinned until ``commit`` has returned
    or the load has failed. Until then nobody reads the slot, and no other load writes it.

    *Threads.* The thread that reads a record makes all three steps: one of the loader's, or the one that runs the
    forward pass. It holds no lock. Several do so at the same time for different slots, and one may begin with another
    slot before it has come to ``commit``. ``tensors`` is for the thread that loads the model.

    *Order.* A kernel that the forward pass starts after ``commit`` has returned reads the new record; one that it
    started before the pool gave the slot away still reads the old one. Memory of a device that runs behind the host
    sees to both: it makes its kernels wait for what ``commit`` started, and what is written wait for its kernels.

    *Failures.* A load that fails is not committed: what ``targets`` gave may be given out again, and the slot holds
    nothing until the ``commit`` of a later load. A second attempt calls ``targets`` again.
    """

    layout: RecordLayout
    slots: int
    pages_stay: bool = False
    """Whether its addresses stand for the same pages of memory as long as it exists, once these have been written."""

    @abstractmethod
    def targets(self, slot: int) -> Sequence[NDArray[np.uint8]]:
        """Where to write the next record of ``slot``: per component of the layout a writable host array ``[nbytes]``.

        One of a whole number of the disk's blocks starts where a block may be read to directly.

        Raises:
            LoadError: the system has no memory for it.
        """

    @abstractmethod
    def commit(self, slot: int) -> None:
        """The record in ``targets(slot)`` is complete.

        Raises:
            LoadError: it cannot be brought to where kernels read it; the load has failed.
        """

    @abstractmethod
    def tensors(self) -> Sequence["torch.Tensor"]:
        """What kernels read: per component of the layout a dense uint8 tensor ``[slots, nbytes]`` on their device.

        The addresses stay as long as the memory.
        """


class HostArrays(SlotMemory):
    """Slots that kernels of this processor read in place, and that loads write in place.

    Records are taken apart: per component of the layout one dense uint8 array ``[slots, nbytes]``, since CPU kernels
    accept a strided first dimension but then compute wrong numbers. Every array starts on a page.
    """

    components: tuple[NDArray[np.uint8], ...]

    def targets(self, slot: int) -> list[NDArray[np.uint8]]:
        assert 0 <= slot < self.slots
        return [component[slot] for component in self.components]

    def commit(self, slot: int) -> None:
        """Kernels read what has been written."""

    def tensors(self) -> tuple["torch.Tensor", ...]:
        import torch

        return tuple(torch.from_numpy(component) for component in self.components)


class HostMemory(HostArrays):
    """Private memory of this process.

    Pages are taken from the system when a slot is first written: huge ones where the system has them, since an
    O_DIRECT read pins the pages it writes to one by one.
    """

    pages_stay = True

    def __init__(self, layout: RecordLayout, slots: int):
        self.layout = layout
        self.slots = slots
        self.components = tuple(_on_huge_pages(slots, part.nbytes) for part in layout.components)


def _on_huge_pages(slots: int, nbytes: int) -> NDArray[np.uint8]:
    """Private memory that starts on a huge page. It ends where its bytes do, so it never takes more than these."""
    size = slots * nbytes
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -np.frombuffer(memory, dtype=np.uint8).ctypes.data % HUGE_PAGE_BYTES
    if size:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, start, size)
    return np.frombuffer(memory, dtype=np.uint8, count=size, offset=start).reshape(slots, nbytes)
