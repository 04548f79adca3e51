"""Traces of requests that ended here, until the daemon has them, and after that in case it loses them.

A daemon that dies takes with it what it has not saved. So the latest ones stay here, and go to the next daemon again.
"""

import threading
from collections import deque
from typing import NamedTuple

from ..trace.trace import Trace

DEFAULT_BUDGET_BYTES = 32 << 20


class Upload(NamedTuple):
    """A trace that a daemon should have."""

    number: int
    trace: Trace
    maybe_duplicate: bool
    """A daemon may have had it before."""


class Outbox:
    """The latest traces within a byte budget, in the order in which they came. Any thread may use it."""

    def __init__(self, budget_bytes: int = DEFAULT_BUDGET_BYTES):
        self._budget_bytes = budget_bytes
        self._traces: deque[tuple[int, Trace]] = deque()
        self._nbytes = 0
        self._arrived = 0
        self._next = 0
        """Number of the first trace that the present daemon does not have."""
        self._offered = 0
        """Number of the first trace that no daemon was ever offered."""
        self._lock = threading.Lock()

    def put(self, trace: Trace) -> None:
        """A request has ended. The oldest ones are forgotten where there is no room, the newest one never."""
        with self._lock:
            self._traces.append((self._arrived, trace))
            self._arrived += 1
            self._nbytes += _nbytes(trace)
            while self._nbytes > self._budget_bytes and len(self._traces) > 1:
                self._nbytes -= _nbytes(self._traces.popleft()[1])

    def next(self) -> Upload | None:
        """What the present daemon should have next; None if it has everything. It counts as offered now."""
        with self._lock:
            for number, trace in self._traces:
                if number >= self._next:
                    maybe_duplicate = number < self._offered
                    self._offered = max(self._offered, number + 1)
                    return Upload(number, trace, maybe_duplicate)
            return None

    @property
    def empty(self) -> bool:
        """Whether the present daemon has everything."""
        with self._lock:
            return not self._traces or self._traces[-1][0] < self._next

    def delivered(self, number: int) -> None:
        """The present daemon has the trace of this number."""
        with self._lock:
            self._next = number + 1

    def drop(self, number: int) -> None:
        """No daemon wants the trace of this number."""
        with self._lock:
            self._traces = deque(kept for kept in self._traces if kept[0] != number)
            self._nbytes = sum(_nbytes(trace) for _, trace in self._traces)

    def start_over(self) -> None:
        """There is another daemon, which has nothing."""
        with self._lock:
            self._next = 0


def _nbytes(trace: Trace) -> int:
    arrays = (trace.experts, trace.weights, trace.tokens, trace.phase, trace.embeddings)
    return sum(array.nbytes for array in arrays if array is not None)
