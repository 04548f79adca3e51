"""Slots in shared memory: what pool.HostMemory is to one engine, for all engines of a host.

There is a slot for every expert of a pool; how many may be occupied at a time is the daemon's business. A slot must
never take memory beyond its own bytes, but for small pages that it shares with a neighbour.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, LoadError
from ..pool.memory import HostArrays
from ..store.layout import ALIGNMENT, RecordLayout
from .shm import Mapping, whole_pages


def arena_bytes(layout: RecordLayout, slots: int) -> int:
    """Size of the memory behind an arena."""
    return sum(whole_pages(slots * part.nbytes) for part in layout.components)


def slot_bytes(layout: RecordLayout) -> int:
    """Memory a slot among empty ones can take: of a part that is no whole number of pages, also where it ends."""
    page = mmap.PAGESIZE
    return sum(
        part.nbytes if part.nbytes % page == 0 else whole_pages(part.nbytes) + page for part in layout.components
    )


class Arena(HostArrays):
    """``slots`` records taken apart: per component of the layout one dense uint8 array ``[slots, nbytes]``.

    The arrays keep their addresses whatever happens to the memory behind them, and are marked writable even where a
    process may only read: what may be written is what ``slot`` gives. Each starts on a page.

    Args:
        owned: the memory is this process's to take from the system and to give back.
    """

    def __init__(self, layout: RecordLayout, slots: int, mapping: Mapping, owned: bool):
        self.layout = layout
        self.slots = slots
        self.mapping = mapping
        self.allocated = np.zeros(slots, dtype=bool)
        """Slots whose pages have been taken by ``allocate``."""
        sizes = [whole_pages(slots * part.nbytes) for part in layout.components]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.components: tuple[NDArray[np.uint8], ...] = tuple(
            mapping.array(start, np.uint8, (slots, part.nbytes))
            for start, part in zip(self._starts, layout.components, strict=True)
        )
        large_pages = 0 < mapping.large_page_bytes <= max((part.nbytes for part in layout.components), default=0)
        unaligned = any(part.nbytes % ALIGNMENT for part in layout.components)
        # large pages have to be taken before anything is read; parts that are no whole blocks are read aside and copied
        self._allocates = owned and (large_pages or unaligned)

    @classmethod
    def create(cls, name: str, layout: RecordLayout, slots: int) -> "Arena":
        """Empty slots, writable, in new memory.

        Raises:
            ConfigError: the system has no room for it.
        """
        return cls(layout, slots, Mapping.create(name, arena_bytes(layout, slots)), owned=True)

    @classmethod
    def attach(cls, fd: int, layout: RecordLayout, slots: int) -> "Arena":
        """The arena of a peer, to read. Takes ``fd`` over.

        Raises:
            PeerMemoryError: it is not memory of this size with its size sealed.
        """
        return cls(layout, slots, Mapping.attach(fd, arena_bytes(layout, slots), writable=False), owned=False)

    def targets(self, slot: int) -> list[NDArray[np.uint8]]:
        assert self.mapping.writable
        if self._allocates:
            try:
                self.allocate(slot)
            except ConfigError as error:
                raise LoadError(str(error)) from error
        return self.slot(slot)

    def slot(self, index: int) -> list[NDArray[np.uint8]]:
        """The bytes of slot ``index``, one array per component, writable where the process may write."""
        parts = [component[index] for component in self.components]
        if not self.mapping.writable:
            for part in parts:
                part.flags.writeable = False
        return parts

    def allocate(self, index: int) -> None:
        """Take the pages of a slot, if it has none, before anything is written to it by another way than O_DIRECT.

        Raises:
            ConfigError: the system has not enough memory; found out in copying, it would end the process.
        """
        if not self.allocated[index]:
            for offset, nbytes in self._ranges(index):
                self.mapping.allocate(offset, nbytes)
            self.allocated[index] = True

    def punch(self, index: int) -> None:
        """Give the pages of a slot nobody reads back to the system. Pages it shares with a neighbour stay."""
        for offset, nbytes in self._ranges(index):
            self.mapping.punch(offset, nbytes)
        self.allocated[index] = False

    def _ranges(self, index: int) -> list[tuple[int, int]]:
        return [
            (start + index * part.nbytes, part.nbytes)
            for start, part in zip(self._starts, self.layout.components, strict=True)
            if part.nbytes
        ]
