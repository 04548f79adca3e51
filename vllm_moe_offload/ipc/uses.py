"""Which experts a worker used, told to the daemon's eviction policy without a message: a ring with one writer.

What the writer overtakes is lost, and only skews a policy. The daemon must never trust what it finds in it.
"""

import numpy as np
from numpy.typing import NDArray

from .table import HEAD, RING, ResidencyTable

STEP = -1
"""Noted instead of an expert: a forward pass begins."""
LONGEST = RING // 16
"""What may be noted at once: so much of the ring may be half written at any time."""


class UseWriter:
    """The worker's side."""

    def __init__(self, table: ResidencyTable, worker: int):
        self._ring = table.uses[worker]
        self._entry = table.entries[worker].data

    def note(self, experts: NDArray[np.integer]) -> None:
        """Append up to LONGEST flat expert ids (``STEP`` first, where a step begins).

        Raises:
            ValueError: there are more.
        """
        if len(experts) > LONGEST:
            raise ValueError(f"{len(experts)} uses noted at once; at most {LONGEST} may be")
        head = self._entry[HEAD]
        start, end = head % RING, head % RING + len(experts)
        if end <= RING:
            self._ring[start:end] = experts
        else:
            self._ring[start:] = experts[: RING - start]
            self._ring[: end - RING] = experts[RING - start :]
        self._entry[HEAD] = head + len(experts)


class UseReader:
    """The daemon's side; made when the worker's entry is clear.

    On machines that reorder stores the last few of the ids drained may be those of a round ago.
    """

    def __init__(self, table: ResidencyTable, worker: int):
        self._ring = table.uses[worker]
        self._entry = table.entries[worker].data
        self._experts = table.experts
        self._tail = 0

    def drain(self) -> NDArray[np.int32]:
        """What was noted since the last call, in order, int32: expert ids and STEP, without what was overwritten."""
        head = self._entry[HEAD]
        tail = self._tail if self._tail <= head <= self._tail + RING else max(0, head - RING)
        self._tail = head
        noted = self._ring[(tail % RING + np.arange(head - tail)) % RING]
        # Meanwhile the writer went on: to the head it shows now, and somewhere into what it notes next.
        overwritten = max(0, self._entry[HEAD] + LONGEST - RING - tail)
        noted = noted[overwritten:]
        return noted[(noted >= STEP) & (noted < self._experts)]
