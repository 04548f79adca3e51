"""The cache during a replay, and what became of every load: demanded, useful, late or wasted."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy, ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..errors import ConfigError
from ..prefetch.foresight import ForesightPolicy
from ..slots.base import guess_room, stream_share


@dataclass
class Tally:
    """Counts over a replay. A use is one expert read by one layer of one step, however many rows share it."""

    accesses: int = 0
    demand_loads: int = 0
    prefetch_loads: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0

    @property
    def demand_miss_rate(self) -> float:
        """Share of uses that waited for a load nobody had started in time."""
        return (self.demand_loads + self.late) / self.accesses if self.accesses else 0.0

    @property
    def loads_per_use(self) -> float:
        """All loads, demanded and prefetched, per use."""
        return (self.demand_loads + self.prefetch_loads) / self.accesses if self.accesses else 0.0


class Residency:
    """An ``ExpertCache`` whose prefetches stay pinned until their layer has run, with the books kept."""

    def __init__(self, layers: int, experts: int, slots: int, policy: EvictionPolicy):
        self.experts = experts
        self.foresight = ForesightPolicy(policy, layers * experts)
        self.cache = ExpertCache(np.repeat(np.arange(layers), experts), slots, self.foresight)
        self.tally = Tally()
        self._speculative = np.zeros(layers * experts, bool)
        self._pinned: list[list[NDArray[np.int32]]] = [[] for _ in range(layers)]
        self._num_pinned = 0

    def begin_step(self) -> None:
        self.cache.begin_step()

    def use(self, layer: int, ids: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
        """The running layer reads ``ids``: returns those that must be loaded now, and all pinned slots.

        Prefetches for this layer are unpinned; the caller releases the slots when the layer has run.
        """
        for slots in self._pinned[layer]:
            self.cache.release(slots)
            self._num_pinned -= len(slots)
        self._pinned[layer].clear()
        self.foresight.expected[layer * self.experts : (layer + 1) * self.experts] = 0
        try:
            acquired = self.cache.acquire(ids)
        except ValueError as error:
            raise ConfigError(
                f"slots: {self.cache.num_slots} are too few for one step of this trace ({error}); give more slots or a "
                "smaller batch"
            ) from error
        self._note_evicted(acquired.evicted)
        self.tally.accesses += len(ids)
        self.tally.demand_loads += len(acquired.missing)
        first_use = ids[self._speculative[ids]]
        self.tally.useful += len(first_use)
        self._speculative[first_use] = False
        return acquired.missing, acquired.slots

    def release(self, slots: NDArray[np.int32]) -> None:
        self.cache.release(slots)

    def absent(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer have no slot, ``[E]``."""
        return self.cache.slot_of[layer * self.experts : (layer + 1) * self.experts] == ABSENT

    def prefetch(self, layer: int, ids: IntArray) -> IntArray:
        """Give slots to guesses for ``layer``, best first; returns those that got one and are to be loaded.

        As in the engine, guesses hold at most half of what a whole layer leaves.
        """
        room = guess_room(self.cache.num_slots, self.experts, self._num_pinned)
        if room == 0 or not len(ids):
            return ids[:0]
        admitted = self.cache.admit(ids[:room])
        self._note_evicted(admitted.evicted)
        self._speculative[admitted.missing] = True
        self.tally.prefetch_loads += len(admitted.missing)
        self._pinned[layer].append(admitted.missing_slots)
        self._num_pinned += len(admitted.missing_slots)
        return admitted.missing

    def stream(self, layer: int, ids: IntArray) -> tuple[IntArray, NDArray[np.int32]]:
        """As ``use``, in a long prefill: what is missing passes through a share of the slots."""
        streamed = self.cache.stream(ids, stream_share(self.cache.num_slots, self.experts))
        self._note_evicted(streamed.evicted)
        if (streamed.slots == ABSENT).any():
            self.cache.release(streamed.slots[streamed.slots != ABSENT])
            self.cache.forget(streamed.missing)
            return self.use(layer, ids)
        self.tally.accesses += len(ids)
        self.tally.demand_loads += len(streamed.missing)
        return streamed.missing, streamed.slots

    def withdraw(self, layer: int, ids: list[int]) -> None:
        """Guesses for ``layer``, which is about to run, were wrong and have not begun to load: they never will."""
        gone = np.array(ids, np.int64)
        slots = self.cache.slot_of[gone]
        kept = [pinned[~np.isin(pinned, slots)] for pinned in self._pinned[layer]]
        self._pinned[layer] = kept
        self._num_pinned -= len(slots)
        self.cache.release(slots)
        self.cache.forget(gone)
        self._speculative[gone] = False
        self.tally.prefetch_loads -= len(gone)

    def was_late(self, count: int) -> None:
        """``count`` prefetches counted as useful when used had in fact not arrived."""
        self.tally.useful -= count
        self.tally.late += count

    def finish(self) -> Tally:
        """Close the books: what was never used is wasted."""
        self.tally.wasted += int(self._speculative.sum())
        self._speculative[:] = False
        return self.tally

    def _note_evicted(self, evicted: IntArray) -> None:
        if len(evicted):
            self.tally.wasted += int(self._speculative[evicted].sum())
            self._speculative[evicted] = False
