"""The cache during a replay. It reports what became of loads as the pools of an engine do."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, EvictionPolicy, ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..cache.outcomes import SpeculativeLoads, speculative_room, stream_share
from ..cache.policies import PredictionAwarePolicy
from ..errors import ConfigError
from ..load_report import NOTHING, LoadReport


@dataclass
class Tally:
    """Counts over a replay. A use is one expert read by one layer of one step, however many rows share it."""

    accesses: int = 0
    demand_loads: int = 0
    prefetch_loads: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0

    def add(self, report: LoadReport) -> None:
        self.accesses += report.hits + report.misses
        self.demand_loads += report.misses
        self.prefetch_loads += report.started - report.withdrawn
        self.useful += report.useful
        self.late += report.late
        self.wasted += report.wasted

    @property
    def demand_miss_rate(self) -> float:
        """Share of uses that waited for a load nobody had started in time."""
        return (self.demand_loads + self.late) / self.accesses if self.accesses else 0.0

    @property
    def loads_per_use(self) -> float:
        """All loads, demanded and prefetched, per use."""
        return (self.demand_loads + self.prefetch_loads) / self.accesses if self.accesses else 0.0


class ReplayCache:
    """An ``ExpertCache`` whose prefetches stay pinned until their layer has run.

    It has no clock: that a prefetch is late, and what loads take, is added to its reports by whoever has one.
    """

    def __init__(self, layers: int, experts: int, slots: int, policy: EvictionPolicy):
        self.experts = experts
        self.policy = PredictionAwarePolicy(policy, layers * experts)
        self.cache = ExpertCache(np.repeat(np.arange(layers), experts), slots, self.policy)
        self._speculative = SpeculativeLoads()
        self._pinned: list[list[NDArray[np.int32]]] = [[] for _ in range(layers)]
        self._num_pinned = 0

    def begin_step(self) -> None:
        self.cache.begin_step()

    def use(self, layer: int, ids: IntArray) -> tuple[IntArray, NDArray[np.int32], LoadReport]:
        """The running layer reads ``ids``: returns those that must be loaded now, and all pinned slots.

        Prefetches for this layer are unpinned; the caller releases the slots when the layer has run.
        """
        for slots in self._pinned[layer]:
            self.cache.release(slots)
            self._num_pinned -= len(slots)
        self._pinned[layer].clear()
        self.policy.expected[layer * self.experts : (layer + 1) * self.experts] = 0
        try:
            acquired = self.cache.acquire(ids)
        except ValueError as error:
            raise ConfigError(
                f"slots: {self.cache.num_slots} are too few for one step of this trace ({error}); give more slots or a "
                "smaller batch"
            ) from error
        return acquired.missing, acquired.slots, self._read(ids, acquired)

    def release(self, slots: NDArray[np.int32]) -> None:
        self.cache.release(slots)

    def absent(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer have no slot, ``[E]``."""
        return self.cache.slot_of[layer * self.experts : (layer + 1) * self.experts] == ABSENT

    def prefetch(self, layer: int, ids: IntArray) -> tuple[IntArray, LoadReport]:
        """Give slots to speculative loads for ``layer``, best first; returns those that got one and shall be read."""
        room = speculative_room(self.cache.num_slots, self.experts, self._num_pinned)
        if room == 0 or not len(ids):
            return ids[:0], NOTHING
        admitted = self.cache.admit(ids[:room])
        report = LoadReport(started=len(admitted.missing), wasted=self._speculative.evict(admitted.evicted))
        self._speculative.start(admitted.missing)
        self._pinned[layer].append(admitted.missing_slots)
        self._num_pinned += len(admitted.missing_slots)
        return admitted.missing, report

    def stream(self, layer: int, ids: IntArray) -> tuple[IntArray, NDArray[np.int32], LoadReport]:
        """As ``use``, in a long prefill: what is missing passes through a share of the slots."""
        streamed = self.cache.stream(ids, stream_share(self.cache.num_slots, self.experts))
        if streamed is None:
            return self.use(layer, ids)
        return streamed.missing, streamed.slots, self._read(ids, streamed)

    def withdraw(self, layer: int, ids: list[int]) -> LoadReport:
        """Speculative loads that ``layer``, which is about to run, does not need, are not begun and never will be."""
        gone = np.array(ids, np.int64)
        slots = self.cache.slot_of[gone]
        kept = [pinned[~np.isin(pinned, slots)] for pinned in self._pinned[layer]]
        self._pinned[layer] = kept
        self._num_pinned -= len(slots)
        self.cache.release(slots)
        self.cache.forget(gone)
        for expert in ids:
            self._speculative.cancel(expert)
        return LoadReport(withdrawn=len(gone))

    def finish(self) -> LoadReport:
        """The replay is over: what was never used is wasted."""
        return LoadReport(wasted=self._speculative.finish())

    def _read(self, ids: IntArray, acquired: Acquisition) -> LoadReport:
        misses = len(acquired.missing)
        wasted = self._speculative.evict(acquired.evicted)
        useful = self._speculative.use(ids)
        return LoadReport(hits=len(ids) - misses, misses=misses, useful=useful, wasted=wasted)
