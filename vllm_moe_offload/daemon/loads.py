"""The records of a pool that are on their way into slots: begun, arrived, failed, taken back.

It must never publish a record that is not complete, nor leave an expert in a slot that was not filled.
"""

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, ExpertCache
from ..cache.base import IntArray
from ..cache.outcomes import SpeculativeLoads
from ..errors import LoadError
from ..ipc.arena import Arena
from ..ipc.table import ResidencyTable
from ..pool.loader import Load
from ..pool.memory import SlotMemory
from ..stats import Stats
from ..store.pools import PoolMembers
from .reclaim import SlotReclaimer


class Supply(NamedTuple):
    """What became of a demand."""

    slots: NDArray[np.int32]
    """Of each expert in the order asked; ABSENT where loading failed."""
    loaded: int
    joined: int
    failed: list[tuple[int, LoadError]]
    """Flat ids, and why."""


class DaemonLoad(Load):
    """A record on its way into a slot that several may be waiting for. ``arrived`` is called before they go on.

    Args:
        flat: the expert's id in the pool.
        speculated_by: the worker that expects it to be needed, where none waits for it yet.
        pinned: whether its slot has a pin for the load itself, since nobody has asked for it yet.
        arrived: called at its end.
    """

    __slots__ = ("_arrived", "copied", "flat", "pinned", "speculated_by", "streamed")

    def __init__(
        self,
        layer: int,
        expert: int,
        memory: SlotMemory,
        slot: int,
        flat: int,
        speculated_by: int | None,
        pinned: bool,
        arrived: Callable[["DaemonLoad"], None],
    ):
        super().__init__(layer, expert, memory, slot)
        self.flat = flat
        self.speculated_by = speculated_by
        self.pinned = pinned
        self.streamed = pinned and speculated_by is None
        """Whether it was started ahead of a long prefill."""
        self.copied = False
        """Whether it came from memory instead of the store."""
        self._arrived = arrived

    def finish(self) -> None:
        try:
            self._arrived(self)
        finally:
            super().finish()


class InFlightLoads:
    """Loads from when their slots are taken until they end, and the speculative ones among them.

    Methods are called under the pool's lock unless they say otherwise.

    Args:
        members: the layers that share the pool.
        changed: over the pool's lock; told when a load has ended.
    """

    def __init__(
        self,
        members: PoolMembers,
        cache: ExpertCache,
        reclaimer: SlotReclaimer,
        arena: Arena,
        table: ResidencyTable,
        changed: threading.Condition,
    ):
        self.layer_of = members.layer_of.tolist()
        self.loads: dict[int, DaemonLoad] = {}
        """By expert (flat id)."""
        self.stats = Stats()
        self._number_of = members.number_of.tolist()
        self._cache, self._reclaimer, self._arena, self._table = cache, reclaimer, arena, table
        self._changed = changed
        self._record_bytes = arena.layout.payload_bytes
        self.speculative = SpeculativeLoads()

    def begin(self, acquired: Acquisition, speculated_by: int | None = None, pinned: bool = False) -> list[DaemonLoad]:
        """The loads that an acquisition asks for; see ``DaemonLoad`` for the arguments."""
        if len(acquired.missing) == 0:
            return []
        pairs = zip(acquired.missing.tolist(), acquired.missing_slots.tolist(), strict=True)
        begun = [self._load(expert, slot, speculated_by, pinned) for expert, slot in pairs]
        self.loads.update((load.flat, load) for load in begun)
        assert not self._cache.exposed[acquired.missing_slots].any(), "a slot would be written that may be read"
        self._table.loading[acquired.missing] = 1
        if speculated_by is not None:
            self.speculative.start(acquired.missing)
            self.stats.prefetches += len(begun)
        return begun

    def forget(self, load: DaemonLoad) -> None:
        """Nobody will read it, nor waits for it: it never finishes."""
        self._end(load)
        self._cache.cancel(np.array([load.flat]))
        self._reclaimer.mark_dirty(np.array([load.slot]))
        self.speculative.cancel(load.flat)

    def take_back(self, load: DaemonLoad) -> None:
        """As ``forget``, for a speculative load of what is not needed, before it was read."""
        self.forget(load)
        self.stats.prefetch_withdrawn += 1

    def wait_for(self, experts: IntArray) -> list[DaemonLoad]:
        """The loads of ``experts`` that are under way; speculative ones among them come late."""
        awaited = [self.loads[expert] for expert in experts.tolist() if expert in self.loads]
        self.stats.prefetch_late += self.speculative.use(np.array([load.flat for load in awaited], dtype=np.int64))
        return awaited

    def mispredicted(self, worker: int, experts: IntArray) -> list[DaemonLoad]:
        """What ``worker`` alone expected of the layer of ``experts``, which are all it needs of it."""
        layer, needed = self.layer_of[int(experts[0])], set(experts.tolist())
        return [
            load
            for load in self.loads.values()
            if load.speculated_by == worker
            and load.layer == layer
            and load.flat not in needed
            and self._cache.pins[load.slot] == 1
        ]

    def note_used(self, experts: IntArray) -> None:
        """Somebody used ``experts``, as far as they were there."""
        self.stats.prefetch_useful += self.speculative.use(experts, but=self.loads)

    def note_evicted(self, experts: IntArray) -> None:
        """``experts`` have lost their slots."""
        self.stats.prefetch_wasted += self.speculative.evict(experts)

    def has(self, load: DaemonLoad) -> bool:
        """Whether a load has not ended."""
        return self.loads.get(load.flat) is load

    def disown(self, acquired: Acquisition, begun: Sequence[DaemonLoad]) -> list[int]:
        """Whoever wanted what is missing in an acquisition does not want it any more. Idempotent under one lock.

        Args:
            begun: its loads, as far as it came. What is being read keeps its slot until it has arrived.

        Returns:
            The slots that have no pin of whoever acquired them now.
        """
        void = []
        loads = {load.flat: load for load in begun}
        for expert, slot in zip(acquired.missing.tolist(), acquired.missing_slots.tolist(), strict=True):
            load = loads.get(expert)
            if load is None:
                if self._cache.slot_of[expert] == slot:
                    self._cache.cancel(np.array([expert]))
                    self._reclaimer.mark_dirty(np.array([slot]))
                void.append(slot)
            elif self.has(load):
                load.pinned = True
                void.append(slot)
            elif load.error is not None:
                void.append(slot)
        return void

    def _load(self, expert: int, slot: int, speculated_by: int | None, pinned: bool) -> DaemonLoad:
        layer, number = self.layer_of[expert], self._number_of[expert]
        return DaemonLoad(layer, number, self._arena, slot, expert, speculated_by, pinned, self._arrived)

    def _end(self, load: DaemonLoad) -> None:
        del self.loads[load.flat]
        self._table.loading[load.flat] = 0

    def _arrived(self, load: DaemonLoad) -> None:
        """A load has ended, well or not: called by the thread that read it."""
        with self._changed:
            if load.error is not None:
                self.stats.failed_loads += 1
                self.forget(load)
            else:
                self._end(load)
                self._reclaimer.publish(np.array([load.flat]))
                if load.pinned:
                    self._cache.release(np.array([load.slot]))
                if load.copied:
                    self.stats.imported += 1
                else:
                    self.stats.loads += 1
                    self.stats.loaded_bytes += self._record_bytes
                    if load.speculated_by is not None:
                        self.stats.prefetched_bytes += self._record_bytes
                    elif load.streamed:
                        self.stats.streamed_bytes += self._record_bytes
                    else:
                        self.stats.demanded_bytes += self._record_bytes
            self._changed.notify_all()
