"""Finds slots for the experts that workers ask for, within the limit of a pool where that is a matter of moments.

Its caller holds the pool's lock, which is let go while it waits. It must never give away a slot that is pinned or
exposed, nor wait for a worker longer than a few milliseconds: that may be stopped, and come back in an hour.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from ..cache import Acquisition, ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..cache.outcomes import speculative_room, stream_share
from .pins import WorkerPins
from .reclaim import SlotReclaimer

PATIENCE_SECONDS = 0.005
"""How long a demand waits for workers to finish what they compute before it is served beyond the limit."""
_FIRST_NAP_SECONDS = 20e-6
_LONGEST_NAP_SECONDS = 0.001


class Placement:
    """Takes slots in the cache of a pool.

    A demand of at most a layer always gets its slots. Where it would have to wait for workers that do not go on, it
    gets free ones beyond the limit, so that for each worker one demand may be held that the limit does not allow.
    There is always one: the arena has a slot for every expert, and no free slot is exposed.

    Args:
        layer_sizes: how many experts there are in the layer of each expert.
        pins: of the attached workers, by entry.
        turn: over the pool's lock; notified when pins have been given back.
        evicted: called with the experts that have lost their slots.
    """

    def __init__(
        self,
        cache: ExpertCache,
        reclaimer: SlotReclaimer,
        layer_sizes: IntArray,
        pins: Mapping[int, WorkerPins],
        turn: threading.Condition,
        evicted: Callable[[IntArray], None],
    ):
        self._cache = cache
        self._reclaimer = reclaimer
        self._layer_sizes = layer_sizes
        self._pins = pins
        self._turn = turn
        self._evicted = evicted
        self.queue: deque[object] = deque()
        """Demands that wait for room, in the order in which they came."""

    def acquire(self, experts: IntArray, stream: bool) -> Acquisition:
        """Pin ``experts``, waiting a moment until others hold so little that they fit. Those who wait come in order.

        Args:
            stream: a long prefill passes through, see ``ExpertCache.stream``.
        """
        if stream:  # what has streamed through goes first, but not while it is pinned
            self.release_done()
        if not self.queue and (acquired := self._try_to_acquire(experts, stream)) is not None:
            return acquired
        self.release_done()
        turn = object()
        self.queue.append(turn)
        try:
            for _ in self._moments(len(experts) <= self._cache.limit):
                if self.queue[0] is turn and (acquired := self._try_to_acquire(experts, stream)) is not None:
                    return acquired
        finally:
            self.queue.remove(turn)
            self._turn.notify_all()
        return self._take(self._cache.acquire(experts, use=False, beyond_limit=True))

    def stream_ahead(self, absent: IntArray) -> Iterator[Acquisition]:
        """Pin ``absent`` experts of the next layer of a long prefill as slots become free within a moment."""
        for _ in self._moments(True):
            absent = absent[self._cache.slot_of[absent] == ABSENT]
            if len(absent) == 0:
                return
            if self._cache.limit >= self._cache.num_slots:
                yield self._take(self._cache.admit(absent))
            else:
                share = self._share(absent)
                self._retire_for(absent, share)
                yield self._take(self._cache.stream_ahead(absent, share))
            if not self._some_are_leaving():
                return

    def place_speculative(self, absent: IntArray, resident: IntArray, in_flight: int) -> Acquisition:
        """Pin as many of the ``absent`` experts of a layer, best first, as fit without waiting.

        Args:
            resident: those of the layer that are expected to be needed as well, and stay.
            in_flight: loads that have not ended.
        """
        if len(absent) == 0:
            return self._cache.admit(absent)
        self._reclaimer.reclaim()
        room = speculative_room(self._cache.limit, self._layer_size(absent), in_flight)
        # half of the reserve is left to demands
        room = max(0, min(room, self._cache.available - self._reclaimer.reserve // 2))
        return self._take(self._cache.admit(absent[:room], protect=resident))

    def release_done(self) -> None:
        """Unpin what workers have finished computing on."""
        released = [pins.release_done(self._cache) for pins in self._pins.values()]
        if self.queue and any(released):
            self._turn.notify_all()

    def _moments(self, patient: bool) -> Iterator[None]:
        """Once now, and again and again for a moment; once only if someone has been waited for in vain already."""
        nap, deadline = _FIRST_NAP_SECONDS, time.monotonic() + PATIENCE_SECONDS
        while True:
            yield
            if not patient or time.monotonic() >= deadline or self._held_up():
                return
            self._turn.wait(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)
            self.release_done()

    def _held_up(self) -> bool:
        """Whether what is waited for depends on a worker that others have waited for too long already."""
        if self._reclaimer.held_up(PATIENCE_SECONDS):
            return True
        since = time.monotonic() - PATIENCE_SECONDS
        return not self._some_are_leaving() and any(pins.holding_since < since for pins in self._pins.values())

    def _some_are_leaving(self) -> bool:
        """Whether retired experts are still exposed."""
        return any(self._cache.exposed[slot] for slot in self._cache.retired)

    def _try_to_acquire(self, experts: IntArray, stream: bool) -> Acquisition | None:
        """Pin all of ``experts`` or none."""
        if stream and len(experts) and self._cache.limit < self._cache.num_slots:
            share = self._share(experts)
            self._retire_for(experts, share)
            if (streamed := self._cache.stream(experts, share)) is not None:
                return self._take(streamed)
        self._retire_for(experts)
        try:
            return self._take(self._cache.acquire(experts, use=False))
        except ValueError:
            return None

    def _retire_for(self, experts: IntArray, share: int | None = None) -> None:
        """Let others leave for ``experts``; their slots can be taken when nobody reads them, which may be at once."""
        if (self._cache.slot_of[experts] != ABSENT).all():
            return
        self._reclaimer.retire(self._cache.retire_for(experts, share))
        self._reclaimer.reclaim()

    def _take(self, acquired: Acquisition) -> Acquisition:
        if len(acquired.evicted):
            self._evicted(acquired.evicted)
        return acquired

    def _layer_size(self, experts: IntArray) -> int:
        return int(self._layer_sizes[experts[0]])

    def _share(self, experts: IntArray) -> int:
        return stream_share(self._cache.limit, self._layer_size(experts))
