"""Reading slots without asking, and finding out when a slot is no longer read: epoch-based reclamation.

A *reader* (a worker) enters, looks slots up in ``slot_of``, computes on them, and leaves. The *reclaimer* (the daemon)
unpublishes an expert, waits until everyone who may have seen it has left, and only then lets its slot be overwritten.
Readers execute no fence and no atomic instruction; the reclaimer's barrier reaches into them with membarrier(2).

Stores and loads, each of one aligned element and therefore whole (single-copy atomic): memoryview and numpy move 4- and
8-byte elements with one instruction, also inside a gather. W is the reclaimer, R a reader ``w``:

    enter   R1  e = epoch                      retire   W1  slot_of[victim] = ABSENT
            R2  active[w] = e                           B1  barrier
    read    R3  s = slot_of[x]                          W2  r = epoch = epoch + 1
            R4  bytes of slot s                reclaim  W3  free if active[w] == 0 or active[w] >= r, for all w
    leave   R5  active[w] = 0                           B2  barrier
                                               reuse    W4  overwrite the slot
                                               publish  B3  barrier
                                                        W5  slot_of[new] = slot

``barrier`` is MEMBARRIER_CMD_GLOBAL_EXPEDITED: while it runs, every reader passes a full fence at some point ``p`` of
its program: what stands before ``p`` is visible to W after the call, and what stands after ``p`` sees everything W did
before the call. (A thread that is not running passed a fence when it was switched out. The kernel's computing threads
are ordered with the thread that enters and leaves by the locks that start and join them.) So, on x86 and ARM alike:

1. *Nobody reads a victim unseen.* Take ``p`` of B1. If R3 is after ``p`` it sees W1, hence ABSENT. If R3 is before
   ``p``, so are R2 and R1: W3 sees R2 (or that the reader has left since), and R1 read an epoch from before W2, e < r.
   The slot is not free until the reader leaves. That is why the epoch rises after the barrier: a reader that shows r
   or more can only have looked after ``p``.
2. *A stale epoch is harmless.* R1 may read an old value, or R2 may come long after R1: then e is smaller than it might
   be, and the reader holds up more than it must. It can never be larger than the epoch of its R3.
3. *A reader that has left has read.* If W3 sees R5, or a later R2, that store is before ``p`` of B2, and with it all of
   R4: no load of R4 can be satisfied after W4 begins. x86 keeps loads before later stores and would need no B2; ARM
   does not.
4. *Who sees an expert published sees its record.* The record was complete before B3. A reader whose R3 sees W5 is after
   ``p`` of B3, so its R4 is too. Where R4's address comes from R3 the dependency would order the reader's side even
   without B3, once W ordered its own; a worker that reads expert i in slot i whatever R3 returned has none.
   Between W5 and the next W1 the expert may be found by readers of any epoch.

The order of W1 and W5 of different experts that share a slot follows from 1: the slot was free in between.
It must never be used by a process that has not registered (``Reader`` does), nor with an entry two processes write.
"""

import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from . import membarrier
from .table import ABSENT, ACTIVE, EPOCH, ResidencyTable

_NONE = np.empty(0, dtype=np.int32)


class Reader:
    """A worker's side. One thread enters and leaves; what it computes in between must be over when it leaves.

        reader.enter()
        slots = table.slot_of[experts]
        if slots.min() >= 0:
            compute(arena, slots)
        reader.leave()

    Raises:
        UnsupportedError: the kernel lacks membarrier(2).
    """

    def __init__(self, table: ResidencyTable, worker: int):
        membarrier.register()
        self._header = table.header.data
        self._entry = table.entries[worker].data

    def enter(self) -> None:
        """From now until ``leave``, the record of an expert found in ``slot_of`` stays what it is."""
        self._entry[ACTIVE] = self._header[EPOCH]

    def leave(self) -> None:
        """Slots looked up since ``enter`` must not be read any more."""
        self._entry[ACTIVE] = 0


class Reclaimer:
    """The daemon's side; its caller holds the pool's lock.

    A slot is published, read by anyone, retired, given back once by ``reclaim``, written, and published again.
    """

    def __init__(self, table: ResidencyTable, barrier: Callable[[], None] = membarrier.barrier):
        self._table = table
        self._barrier = barrier
        self._epoch = table.epoch
        self._retired: deque[tuple[int, NDArray[np.int32], float]] = deque()
        """Epoch, slots, and when they were retired."""
        self._frozen = False

    def freeze(self) -> None:
        """No slot comes back any more: what workers have seen in the table stays true for ever."""
        self._frozen = True

    def publish(self, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Let workers find experts whose records are complete in these slots."""
        assert len(experts) == len(slots)
        self._barrier()
        self._table.slot_of[experts] = slots

    def retire(self, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Hide experts; their slots come back from ``reclaim`` when nobody reads them any more."""
        assert len(experts) == len(slots)
        self._table.slot_of[experts] = ABSENT
        self._barrier()
        self._epoch += 1
        self._table.header[EPOCH] = self._epoch
        assert not self._retired or self._retired[-1][0] < self._epoch
        self._retired.append((self._epoch, np.array(slots, dtype=np.int32), time.monotonic()))

    def reclaim(self) -> NDArray[np.int32]:
        """Retired slots that may be written now, each given once, the longest retired first."""
        if self._frozen or not self._retired:
            return _NONE
        oldest = self._oldest_reader()
        free = []
        while self._retired and self._retired[0][0] <= oldest:
            free.append(self._retired.popleft()[1])
        if not free:
            return _NONE
        self._barrier()
        return np.concatenate(free)

    @property
    def waiting(self) -> int:
        """Slots retired and not yet given back."""
        return sum(len(slots) for _, slots, _ in self._retired)

    @property
    def waiting_seconds(self) -> float:
        """For how long the longest retired slot has not been given back; 0 when there is none."""
        return time.monotonic() - self._retired[0][2] if self._retired else 0.0

    def _oldest_reader(self) -> int:
        """The epoch of the attached worker that has been reading longest.

        Others cannot hold anything up: what they read they find void in the end.
        """
        active = np.where(self._table.attached > 0, self._table.active, 0)
        reading = active[active > 0]
        return int(reading.min()) if len(reading) else self._epoch
