"""The simulated way experts come into fast memory: one load at a time, demands first, guesses behind."""

from collections import deque
from dataclasses import dataclass


@dataclass
class _Pending:
    expert: int
    seconds_left: float


class Link:
    """A queue of prefetches on a clock that only moves when told to.

    A demand interrupts a prefetch at its next chunk. A demand for something queued joins it: only what is left is
    waited for.
    """

    def __init__(self, load_seconds: float, chunk_seconds: float):
        self.load_seconds = load_seconds
        self.chunk_seconds = min(chunk_seconds, load_seconds)
        self.busy_seconds = 0.0
        self._queue: deque[_Pending] = deque()

    @property
    def queue_seconds(self) -> float:
        """Time until everything queued has arrived, if no demand comes."""
        return sum(pending.seconds_left for pending in self._queue)

    def prefetch(self, experts: list[int]) -> None:
        """Queue loads behind what is already queued."""
        self._queue.extend(_Pending(expert, self.load_seconds) for expert in experts)

    def pass_time(self, seconds: float) -> None:
        """``seconds`` go by without a demand."""
        while self._queue and seconds > 0:
            moved = min(seconds, self._queue[0].seconds_left)
            self._queue[0].seconds_left -= moved
            self.busy_seconds += moved
            seconds -= moved
            if self._queue[0].seconds_left <= 1e-12:
                self._queue.popleft()

    def demand(self, missing: int, joined: list[int]) -> float:
        """Wait for ``missing`` new loads and for the ``joined`` ones that are still queued; returns the seconds."""
        wanted = set(joined)
        waiting = [pending for pending in self._queue if pending.expert in wanted]
        seconds = missing * self.load_seconds + sum(pending.seconds_left for pending in waiting)
        if seconds and self._queue and self._queue[0] not in waiting:
            seconds += self._rest_of_chunk()
        self._queue = deque(pending for pending in self._queue if pending not in waiting)
        self.busy_seconds += seconds
        return seconds

    def still_loading(self, experts: list[int]) -> list[int]:
        """Those of ``experts`` that have not arrived."""
        queued = {pending.expert for pending in self._queue}
        return [expert for expert in experts if expert in queued]

    def cancel(self, experts: list[int]) -> None:
        """Drop queued loads that nothing has been moved for."""
        unwanted = set(experts)
        self._queue = deque(
            pending
            for pending in self._queue
            if pending.expert not in unwanted or pending.seconds_left < self.load_seconds
        )

    def _rest_of_chunk(self) -> float:
        """Let the transfer in flight reach the end of its chunk."""
        running = self._queue[0]
        done = self.load_seconds - running.seconds_left
        if done <= 0:
            return 0.0
        rest = min(running.seconds_left, -done % self.chunk_seconds)
        running.seconds_left -= rest
        return rest
