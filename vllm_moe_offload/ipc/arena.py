"""Slots in shared memory: what pool.HostMemory is to one engine, for all engines of a host.

There is a slot for every expert of a pool; how many may be occupied at a time is the daemon's business. A slot must
never take memory beyond its own bytes, but for small pages that it shares with a neighbour.
"""

import numpy as np
from numpy.typing import NDArray

from ..store.layout import RecordLayout
from .shm import Mapping, whole_pages


def arena_bytes(layout: RecordLayout, slots: int) -> int:
    """Size of the memory behind an arena."""
    return sum(whole_pages(slots * part.nbytes) for part in layout.components)


class Arena:
    """``slots`` records taken apart: per component of the layout one dense uint8 array ``[slots, nbytes]``.

    The arrays keep their addresses whatever happens to the memory behind them, and are marked writable even where a
    process may only read: what may be written is what ``slot`` gives. Each starts on a page.
    """

    def __init__(self, layout: RecordLayout, slots: int, mapping: Mapping):
        self.layout = layout
        self.slots = slots
        self.mapping = mapping
        sizes = [whole_pages(slots * part.nbytes) for part in layout.components]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]
        self.components: tuple[NDArray[np.uint8], ...] = tuple(
            mapping.array(start, np.uint8, (slots, part.nbytes))
            for start, part in zip(self._starts, layout.components, strict=True)
        )

    @classmethod
    def create(cls, name: str, layout: RecordLayout, slots: int) -> "Arena":
        """Empty slots, writable, in new memory.

        Raises:
            ConfigError: the system has no room for it.
        """
        return cls(layout, slots, Mapping.create(name, arena_bytes(layout, slots)))

    @classmethod
    def attach(cls, fd: int, layout: RecordLayout, slots: int) -> "Arena":
        """The arena of a peer, to read. Takes ``fd`` over.

        Raises:
            PeerMemoryError: it is not memory of this size with its size sealed.
        """
        return cls(layout, slots, Mapping.attach(fd, arena_bytes(layout, slots), writable=False))

    @property
    def takes_large_pages(self) -> bool:
        """Whether ``allocate`` finds room for some inside a slot."""
        return 0 < self.mapping.large_page_bytes <= max(part.nbytes for part in self.layout.components)

    def slot(self, index: int) -> list[NDArray[np.uint8]]:
        """The bytes of slot ``index``, one array per component, writable where the process may write."""
        parts = [component[index] for component in self.components]
        if not self.mapping.writable:
            for part in parts:
                part.flags.writeable = False
        return parts

    def allocate(self, index: int) -> None:
        """Take the pages of a slot before anything is read into it.

        Raises:
            ConfigError: the system has not enough memory.
        """
        for offset, nbytes in self._ranges(index):
            self.mapping.allocate(offset, nbytes)

    def punch(self, index: int) -> None:
        """Give the pages of a slot nobody reads back to the system. Pages it shares with a neighbour stay."""
        for offset, nbytes in self._ranges(index):
            self.mapping.punch(offset, nbytes)

    def _ranges(self, index: int) -> list[tuple[int, int]]:
        return [
            (start + index * part.nbytes, part.nbytes)
            for start, part in zip(self._starts, self.layout.components, strict=True)
            if part.nbytes
        ]
