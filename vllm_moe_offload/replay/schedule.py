"""Which tokens run together: the steps an engine with a fixed number of seats would have made of a trace."""

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import PREFILL, Trace

PREFILL_CHUNK = 2048


def steps(trace: Trace, batch: int = 1) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each forward pass.

    ``batch`` requests run at a time; the next takes a seat as one ends. Each seat brings one decoded token, or a chunk
    of up to PREFILL_CHUNK prefill tokens.
    """
    waiting = deque(range(trace.num_requests))
    seats: list[tuple[int, int]] = []
    while waiting or seats:
        while waiting and len(seats) < batch:
            request = waiting.popleft()
            start, stop = int(trace.offsets[request]), int(trace.offsets[request + 1])
            if start < stop:
                seats.append((start, stop))
        if not seats:
            return
        chunks = [np.arange(row, _chunk_end(trace, row, stop)) for row, stop in seats]
        yield np.concatenate(chunks)
        moved = [(int(chunk[-1]) + 1, stop) for chunk, (_, stop) in zip(chunks, seats, strict=True)]
        seats = [(row, stop) for row, stop in moved if row < stop]


def _chunk_end(trace: Trace, row: int, stop: int) -> int:
    if trace.phase is None or trace.phase[row] != PREFILL:
        return row + 1
    ahead = trace.phase[row : min(stop, row + PREFILL_CHUNK)]
    return row + (int(np.argmin(ahead)) if not ahead.all() else len(ahead))
