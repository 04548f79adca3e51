"""The simulated way experts come into fast memory: some loads at a time, demands first, speculative loads behind."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_ARRIVED = 1e-9
"""Of a load: less than this left is nothing left."""


@dataclass(eq=False)
class _Load:
    expert: int | None
    """None for a demand nobody else will ask about."""
    left: float = 1.0
    """Share of it that has not been moved."""


class Link:
    """Loads under way and a queue of speculative ones, on a clock that only moves when told to.

    A demand for something under way or queued joins it: only what is left is waited for. Where loads run one at a
    time, a demand interrupts a speculative load at its next chunk; where there are several places, the last is kept for
    demands.

    Args:
        load_seconds: what each load takes while 1, 2, … are under way together, as many as there are places.
        chunk_seconds: the part of a load that cannot be interrupted, where there is one place.
    """

    def __init__(self, load_seconds: Sequence[float], chunk_seconds: float):
        self.load_seconds = tuple(load_seconds)
        self.chunk_seconds = min(chunk_seconds, self.load_seconds[0])
        self.busy_seconds = 0.0
        self._places = len(self.load_seconds)
        self._queue: deque[_Load] = deque()
        self._under_way: list[_Load] = []

    @property
    def queue_seconds(self) -> float:
        """Time until everything queued has arrived, if no demand comes."""
        left = sum(load.left for load in (*self._under_way, *self._queue))
        together = min(self._speculative_places, len(self._under_way) + len(self._queue))
        return left * self.load_seconds[together - 1] / together if together else 0.0

    def prefetch(self, experts: list[int]) -> None:
        """Queue loads behind what is already queued."""
        self._queue.extend(_Load(expert) for expert in experts)

    def pass_time(self, seconds: float) -> None:
        """``seconds`` go by without a demand."""
        while seconds > 0:
            self._take_up(self._queue, self._speculative_places)
            if not self._under_way:
                return
            seconds -= self._move(seconds)

    def demand(self, missing: int, joined: list[int]) -> float:
        """Wait for ``missing`` new loads and for the ``joined`` ones that have not arrived; returns the seconds."""
        wanted = set(joined)
        waited = self._interrupt(wanted) if missing or wanted else 0.0
        new = [_Load(None) for _ in range(missing)]
        first = deque([load for load in self._queue if load.expert in wanted] + new)
        self._queue = deque(load for load in self._queue if load.expert not in wanted)
        while first or any(load.expert is None or load.expert in wanted for load in self._under_way):
            self._take_up(first, self._places)
            if not first:
                self._take_up(self._queue, self._speculative_places)
            waited += self._move(float("inf"))
        return waited

    def still_loading(self, experts: list[int]) -> list[int]:
        """Those of ``experts`` that have not arrived."""
        loading = {load.expert for load in (*self._under_way, *self._queue)}
        return [expert for expert in experts if expert in loading]

    def cancel(self, experts: list[int]) -> list[int]:
        """Drop the queued loads of ``experts`` that nothing has been moved for, and return them."""
        unwanted = set(experts)
        dropped = [load for load in self._queue if load.expert in unwanted and load.left == 1]
        self._queue = deque(load for load in self._queue if load not in dropped)
        return [load.expert for load in dropped if load.expert is not None]

    @property
    def _speculative_places(self) -> int:
        return max(1, self._places - 1)

    def _take_up(self, queue: deque[_Load], places: int) -> None:
        while queue and len(self._under_way) < places:
            self._under_way.append(queue.popleft())

    def _move(self, most: float) -> float:
        """Let the loads under way go on until the first has arrived, but no longer than ``most``; returns the time."""
        pace = self.load_seconds[len(self._under_way) - 1]
        seconds = min(most, min(load.left for load in self._under_way) * pace)
        for load in self._under_way:
            load.left -= seconds / pace
        self._under_way = [load for load in self._under_way if load.left > _ARRIVED]
        self.busy_seconds += seconds
        return seconds

    def _interrupt(self, wanted: set[int]) -> float:
        """Where loads run one at a time: let a speculative load end its chunk and put it back; returns the time."""
        if self._places > 1 or not self._under_way or self._under_way[0].expert in wanted:
            return 0.0
        done = (1 - self._under_way[0].left) * self.load_seconds[0]
        rest = -done % self.chunk_seconds if done > 0 else 0.0
        waited = self._move(rest) if rest > 0 else 0.0
        self._queue.extendleft(self._under_way)
        self._under_way = []
        return waited
