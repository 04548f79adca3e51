"""Who is in which slot of an arena, and what every worker is doing, in shared memory that all of them map.

The daemon writes the header, ``slot_of`` and ``loading``; a worker writes its own row of everything else. It must
never be the daemon's own memory of anything: whoever maps it can write it, so what is read from a worker's row is a
claim to be checked.
"""

import mmap
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..stats import WORKER_STATISTICS
from .protocol import MAX_WORKERS, VERSION
from .shm import Mapping, PeerMemoryError, whole_pages

ABSENT = -1
RING = 65536
"""Uses a worker can note before the oldest are overwritten."""

_MAGIC = int.from_bytes(b"MOEtable", "little")
_LINE = 64
_STATISTICS_ROW = -(-len(WORKER_STATISTICS) // 8) * 8
"""Words from one worker's statistics to the next one's: whole cache lines."""
# Positions in the header and in a worker's entry, in 8-byte words. What is written often has a cache line of its own.
EPOCH = 8
LIMIT = 24
ARRIVALS = 25
FROZEN = 26
ACTIVE, DONE, HEAD, ATTACHED = 0, 1, 2, 3


class _Places(NamedTuple):
    """Byte offsets of the parts of a table of so many experts."""

    slot_of: int
    loading: int
    entries: int
    stats: int
    expected: int
    row: int
    """float32 elements from one worker's ``expected`` to the next one's."""
    uses: int
    end: int


def _places(experts: int) -> _Places:
    row = -(-experts * 4 // _LINE) * _LINE
    slot_of = mmap.PAGESIZE
    loading = slot_of + whole_pages(4 * experts)
    entries = loading + whole_pages(experts)
    stats = entries + whole_pages(MAX_WORKERS * _LINE)
    expected = stats + whole_pages(MAX_WORKERS * 8 * _STATISTICS_ROW)
    uses = expected + whole_pages(MAX_WORKERS * row)
    return _Places(slot_of, loading, entries, stats, expected, row // 4, uses, uses + MAX_WORKERS * RING * 4)


def table_bytes(experts: int) -> int:
    """Size of the memory behind a table; most of it is never touched."""
    return whole_pages(_places(experts).end)


class ResidencyTable:
    """Arrays over the shared memory of one pool of ``experts`` experts. Workers are numbered ``0 … MAX_WORKERS - 1``.

    Attributes:
        slot_of: int32 ``[experts]``, the slot of every expert whose record is complete in the arena, else ABSENT.
        loading: uint8 ``[experts]``, 1 where a load is under way or admitted.
        active: uint64 ``[workers]``, the epoch at which the worker began to read, 0 when it does not (epochs.py).
        attached: uint64 ``[workers]``, a number no other worker had before, 0 when there is none.
        done: uint64 ``[workers]``, the highest ticket the worker has finished computing with.
        head: uint64 ``[workers]``, how many uses the worker has noted in its row of ``uses`` (uses.py).
        uses: int32 ``[workers, RING]``.
        expected: float32 ``[workers, experts]``, how much the worker's running step is expected to use each expert.
        stats: int64 ``[workers, len(WORKER_STATISTICS)]``, what each worker counts.
    """

    def __init__(self, mapping: Mapping, experts: int):
        assert experts > 0
        places = _places(experts)
        assert places.end <= table_bytes(experts)
        self.mapping = mapping
        self.experts = experts
        self.header: NDArray[np.uint64] = mapping.array(0, np.uint64, (mmap.PAGESIZE // 8,))
        self.slot_of: NDArray[np.int32] = mapping.array(places.slot_of, np.int32, (experts,))
        self.loading: NDArray[np.uint8] = mapping.array(places.loading, np.uint8, (experts,))
        self.entries: NDArray[np.uint64] = mapping.array(places.entries, np.uint64, (MAX_WORKERS, _LINE // 8))
        self.active = self.entries[:, ACTIVE]
        self.attached = self.entries[:, ATTACHED]
        self.done = self.entries[:, DONE]
        self.head = self.entries[:, HEAD]
        statistics: NDArray[np.int64] = mapping.array(places.stats, np.int64, (MAX_WORKERS, _STATISTICS_ROW))
        self.stats = statistics[:, : len(WORKER_STATISTICS)]
        rows: NDArray[np.float32] = mapping.array(places.expected, np.float32, (MAX_WORKERS, places.row))
        self.expected = rows[:, :experts]
        self.uses: NDArray[np.int32] = mapping.array(places.uses, np.int32, (MAX_WORKERS, RING))

    @classmethod
    def create(cls, name: str, experts: int) -> "ResidencyTable":
        """A table of which nothing is resident, nobody reads, and the epoch is 1.

        Raises:
            ConfigError: the system has no room for it.
        """
        table = cls(Mapping.create(name, table_bytes(experts)), experts)
        table.slot_of[:] = ABSENT
        table.header[: len(_facts(experts))] = _facts(experts)
        table.header[EPOCH] = 1
        return table

    @classmethod
    def attach(cls, fd: int, experts: int) -> "ResidencyTable":
        """The table of a daemon's pool. Takes ``fd`` over.

        Raises:
            PeerMemoryError: the memory is no table, or one of another version or size; nothing stays mapped.
        """
        mapping = Mapping.attach(fd, table_bytes(experts), writable=True)
        facts = _facts(experts)
        found = mapping.array(0, np.uint64, (len(facts),))
        for name, mine, theirs in zip(_FACTS, facts.tolist(), found.tolist(), strict=True):
            if mine != theirs:
                mapping.close()
                raise PeerMemoryError(
                    f"the daemon's residency table has {name} {theirs}, this worker needs {mine}; run the daemon and "
                    "the engines from one version of vllm-moe-offload"
                )
        return cls(mapping, experts)

    @property
    def epoch(self) -> int:
        return int(self.header[EPOCH])

    @property
    def limit(self) -> int:
        """How many slots may be occupied at present. Set by the daemon."""
        return int(self.header[LIMIT])

    @limit.setter
    def limit(self, slots: int) -> None:
        assert slots >= 0
        self.header[LIMIT] = slots

    @property
    def frozen(self) -> bool:
        """Whether no slot is overwritten any more that ``slot_of`` shows, though the daemon may live on for a while."""
        return bool(self.header[FROZEN])

    def freeze(self) -> None:
        """What ``slot_of`` shows is true from now on. Set by the daemon, which must keep to it."""
        self.header[FROZEN] = 1

    def admit(self, worker: int) -> None:
        """A worker comes: its entry is as new, and shows a number no worker had before, for as long as it is minded."""
        assert 0 <= worker < MAX_WORKERS
        self.clear(worker)
        self.header[ARRIVALS] += 1
        self.entries[worker, ATTACHED] = self.header[ARRIVALS]

    def clear(self, worker: int) -> None:
        """Make the entry of a worker that is gone as new. Whoever still reads by it can see that it must not."""
        self.entries[worker] = 0
        self.stats[worker] = 0
        self.expected[worker] = 0

    def close(self) -> None:
        """Close the descriptor; the arrays stay usable."""
        self.mapping.close()


_STATISTICS_NAMES = zlib.crc32(" ".join(each.name for each in WORKER_STATISTICS).encode())
_FACTS = ("magic number", "version", "number of experts", "number of workers", "size of rings", "statistics")


def _facts(experts: int) -> NDArray[np.uint64]:
    """What both sides must agree on before anything else is trusted: the first words of the header."""
    return np.array([_MAGIC, VERSION, experts, MAX_WORKERS, RING, _STATISTICS_NAMES], dtype=np.uint64)
