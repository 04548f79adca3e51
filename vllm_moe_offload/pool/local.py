"""A pool whose slots, loads and evictions all belong to this process.

It must never let a kernel read a slot that is not pinned and loaded, whatever exception ended whatever came before.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, ExpertCache, create_policy
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..cache.outcomes import SpeculativeLoads, speculative_room, stream_share
from ..cache.policies import PredictionAwarePolicy
from ..load_report import NOTHING, LoadReport
from ..running_mean import blend
from ..store.layout import RecordLayout
from ..store.pools import PoolMembers
from ..store.reader import Store
from .base import Failure, Hold, HostPool, Span, residency_of
from .in_flight import InFlightLoads
from .loader import Load, RecordLoader
from .memory import HostMemory, SlotMemory
from .operations import Operations
from .void import VoidExperts


class _LoadingHold(Hold):
    __slots__ = ("generation", "loads", "missing", "started")

    def __init__(self, acquired: Acquisition, experts: IntArray, loads: list[Load], generation: int):
        super().__init__(experts, acquired.slots)
        self.missing = acquired.missing
        self.loads = loads
        self.generation = generation
        self.started = time.perf_counter()


class LocalPool(HostPool):
    """Wires cache, memory and loader together.

    A started hold reads ahead of everything but demands, on all threads of the loader.

    Any number of holds may be open at once, as long as all fit into ``capacity``.

    Args:
        members: the layers that share the pool.
        memory: with a slot for every one the cache may give away.
        operations: of all pools of the loader.
    """

    holds_overlap = True

    def __init__(
        self,
        members: PoolMembers,
        memory: SlotMemory,
        cache: ExpertCache,
        operations: Operations[RecordLoader],
    ):
        self.memory = memory
        self.cache = cache
        self.speculative = SpeculativeLoads()
        self.in_flight = InFlightLoads(cache, self.speculative)
        self._operations = operations
        operations.pools.append(self)
        self.experts = members.experts
        self._layer_of = members.layer_of.tolist()
        self._number_of = members.number_of.tolist()
        self._record_bytes = memory.layout.payload_bytes
        self._load_seconds = 0.0
        """Running mean of what a record takes while others are loaded too."""
        self._expected: NDArray[np.float32] | None = None
        self._void = VoidExperts(cache)

    @property
    def loader(self) -> RecordLoader:
        return self._operations.loader

    @property
    def capacity(self) -> int:
        return self.cache.limit

    def begin_step(self) -> LoadReport:
        self._operations.nothing_is_held()
        with self._operations:
            self.cache.begin_step()
            return NOTHING

    def load_all(self) -> LoadReport:
        assert self.capacity >= self.experts
        with self._operations:
            acquired = self.cache.acquire(np.arange(self.experts))
            loads = self._loads(acquired)
            report = self._demand(loads)
            for load in loads:
                if load.error is not None:
                    raise load.error
            return report

    def find(self, experts: IntArray) -> tuple[NDArray[np.int32], LoadReport] | None:
        if self.in_flight.loads or self._void or self._operations.interrupted:
            return None
        slots = self.cache.find(experts)
        return None if slots is None else (slots, LoadReport(hits=len(experts), useful=self.speculative.use(experts)))

    def hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        with self._operations:
            awaited = self._await_in_flight(layer, experts)
            hold, loaded = self._hold_acquired(experts, self.cache.acquire(experts))
            return hold, awaited + loaded

    def hold_resident(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        with self._operations:
            ended = self._ended_ahead()
            under_way = [started.expert for started in self.in_flight.loads]
            there = (self.cache.slot_of[experts] != ABSENT) & ~np.isin(experts, under_way)
            there &= ~np.isin(experts, list(self._void))
            hold, _ = self._new_hold(experts[there], self.cache.acquire(experts[there], use=False))
            return hold, ended + LoadReport(withdrawn=self.speculative.use(hold.experts))

    def hold_streaming(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        with self._operations:
            awaited = self._await_in_flight(layer, experts)
            acquired = self.cache.stream(experts, self._share(layer))
            if acquired is None:
                acquired = self.cache.acquire(experts)
            hold, loaded = self._hold_acquired(experts, acquired)
            return hold, awaited + loaded

    def stream_ahead(self, layer: Span) -> LoadReport:
        with self._operations:
            absent = layer.start + np.flatnonzero(self.absent(layer))
            ahead = self.cache.stream_ahead(absent, self._share(layer))
            self._start_ahead(ahead, speculative=False)
            return self._evicted(ahead) + LoadReport(streamed=len(ahead.missing))

    def settle(self, layer: Span) -> LoadReport:
        with self._operations:
            return self._await_in_flight(layer, np.arange(layer.start, layer.stop))

    def start_hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        with self._operations:
            awaited = self._await_in_flight(layer, experts)
            hold, acquired = self._new_hold(experts, self.cache.acquire(experts))
            self.loader.start(hold.loads)
            return hold, awaited + acquired

    def seconds_to_load(self, count: int) -> float:
        return count * self._load_seconds

    def wait_for(self, hold: Hold, count: int) -> LoadReport:
        assert isinstance(hold, _LoadingHold)
        with self._operations:
            first = hold.experts[:count]
            return LoadReport(waited=self._join(hold.loads[: int(np.isin(hold.missing, first).sum())]))

    def finish_hold(self, layer: Span, hold: Hold) -> tuple[Hold, LoadReport]:
        assert isinstance(hold, _LoadingHold)
        with self._operations:
            assert hold.generation == self._operations.generation
            return hold, self._finish(hold)

    def abandon(self, hold: Hold) -> LoadReport:
        assert isinstance(hold, _LoadingHold)
        with self._operations:
            if hold.generation != self._operations.generation:
                return NOTHING
            report = self._finish(hold)
            self._let_go(hold)
            return report

    def release(self, hold: Hold) -> None:
        assert isinstance(hold, _LoadingHold)
        with self._operations:
            if hold.generation == self._operations.generation:
                self._let_go(hold)

    def empty(self) -> None:
        """Nothing is resident, under way or held any more. Whoever calls it has ended all reads."""
        self.cache.clear()
        self.speculative = SpeculativeLoads()
        self.in_flight = InFlightLoads(self.cache, self.speculative)
        self._void.clear()

    def residency(self, layer: Span) -> NDArray[np.uint8]:
        return residency_of(self.cache.slot_of[layer.start : layer.stop], self.cache.pins)

    def absent(self, layer: Span) -> NDArray[np.bool_]:
        return self.cache.slot_of[layer.start : layer.stop] == ABSENT

    def enable_predictions(self) -> None:
        if self._expected is not None:
            return
        policy = PredictionAwarePolicy(self.cache.policy, self.experts)
        self.cache.policy, self._expected = policy, policy.expected

    def expect(self, layer: Span, probabilities: NDArray[np.float32] | float) -> None:
        assert self._expected is not None, "predictions are not enabled"
        self._expected[layer.start : layer.stop] = probabilities

    def prefetch(self, layer: Span, experts: IntArray) -> LoadReport:
        with self._operations:
            room = speculative_room(self.capacity, len(layer), len(self.in_flight.loads))
            if room == 0:
                return NOTHING
            admitted = self.cache.admit(experts[:room])
            evicted = self._evicted(admitted)
            self._start_ahead(admitted, speculative=True)
            return evicted + LoadReport(started=len(admitted.missing))

    def queued(self) -> int:
        return sum(not started.load.finished for started in self.in_flight.loads)

    def close(self) -> None:
        self._operations.close()

    def _share(self, layer: Span) -> int:
        return stream_share(self.capacity, len(layer))

    def _hold_acquired(self, experts: IntArray, acquired: Acquisition) -> tuple[Hold, LoadReport]:
        hold, report = self._new_hold(experts, acquired)
        if hold.loads:
            report += self._demand(hold.loads)
            self._note_failures(hold)
        return hold, report

    def _finish(self, hold: _LoadingHold) -> LoadReport:
        report = LoadReport(waited=self._join(hold.loads))
        if hold.loads:
            report += self._demanded(hold.loads, max(load.ended for load in hold.loads) - hold.started)
            self._note_failures(hold)
        return report

    def _let_go(self, hold: _LoadingHold) -> None:
        assert self._operations.held > 0
        self._operations.held -= 1
        self.cache.release(hold.slots)
        if hold.failures or self._void:
            self._void.add_released(expert for expert, _ in hold.failures)

    def _new_hold(self, experts: IntArray, acquired: Acquisition) -> tuple[_LoadingHold, LoadReport]:
        assert self.cache.pins[acquired.slots].all(), "a hold needs pins"
        self._operations.held += 1
        hold = _LoadingHold(acquired, experts, self._loads(acquired), self._operations.generation)
        misses = len(acquired.missing)
        return hold, self._evicted(acquired) + LoadReport(hits=len(experts) - misses, misses=misses)

    def _note_failures(self, hold: _LoadingHold) -> None:
        failed = {(load.layer, load.expert): load.error for load in hold.loads if load.error is not None}
        if failed:
            keys = ((int(e), (self._layer_of[e], self._number_of[e])) for e in hold.experts)
            hold.failures = [Failure(expert, failed[key]) for expert, key in keys if key in failed]

    def _start_ahead(self, ahead: Acquisition, speculative: bool) -> None:
        loads = self._loads(ahead)
        self.in_flight.add(loads, ahead.missing, ahead.missing_slots, speculative)
        self.loader.start(loads, speculative=speculative)

    def _await_in_flight(self, layer: Span, needed: IntArray) -> LoadReport:
        """Wait for those of ``needed`` that are still being loaded, and unpin whatever has arrived.

        Waits for all that is under way where the pins of the rest could leave too few slots. Speculative loads of this
        layer that it does not need are taken back where reading has not begun.
        """
        in_flight = self.in_flight.loads
        if not in_flight:
            return LoadReport(useful=self.speculative.use(needed))
        crowded = np.count_nonzero(self.cache.pins) + len(needed) > self.capacity
        wanted = set(needed.tolist())
        taken: set[int] = set()
        wrong = [s for s in in_flight if s.speculative and s.expert not in wanted and s.expert in layer]
        if wrong:
            taken = {id(load) for load in self.loader.withdraw([started.load for started in wrong])}
            self.in_flight.withdrawn([started for started in wrong if id(started.load) in taken])
        awaited = [s for s in self.in_flight.loads if crowded or s.expert in wanted]
        arriving = [s.expert for s in awaited if s.speculative and s.expert in wanted and not s.load.finished]
        late = self.speculative.use(np.array(arriving, dtype=np.int64))
        waited = self._join([started.load for started in awaited])
        ended = self._ended_ahead()
        return ended + LoadReport(
            waited=waited,
            withdrawn=len(taken),
            useful=self.speculative.use(needed),
            late=late,
            late_seconds=waited if late else 0.0,
        )

    def _evicted(self, acquired: Acquisition) -> LoadReport:
        if not len(acquired.evicted):
            return NOTHING
        return LoadReport(wasted=self.speculative.evict(acquired.evicted), evicted=len(acquired.evicted))

    def _loads(self, acquired: Acquisition) -> list[Load]:
        pairs = zip(acquired.missing.tolist(), acquired.missing_slots.tolist(), strict=True)
        return [self._load(expert, slot) for expert, slot in pairs]

    def _load(self, expert: int, slot: int) -> Load:
        return Load(self._layer_of[expert], self._number_of[expert], self.memory, slot)

    def _demand(self, loads: Sequence[Load]) -> LoadReport:
        started = time.perf_counter()
        self.loader.demand(loads)
        seconds = time.perf_counter() - started
        return LoadReport(waited=seconds) + self._demanded(loads, seconds)

    def _demanded(self, loads: Sequence[Load], seconds: float) -> LoadReport:
        """The loader took ``seconds`` for ``loads``, which nobody had started ahead."""
        mean = seconds / len(loads)
        self._load_seconds = blend(self._load_seconds, mean) if self._load_seconds else mean
        return LoadReport(demanded=len(loads), demand_seconds=seconds) + self._ended(loads)

    def _join(self, loads: Sequence[Load]) -> float:
        started = time.perf_counter()
        self.loader.join(loads)
        return time.perf_counter() - started

    def _ended_ahead(self) -> LoadReport:
        """Loads that were started ahead, as far as they have ended by now."""
        finished = self.in_flight.reap()
        if not finished:
            return NOTHING
        prefetched = sum(started.speculative for started in finished)
        return self._ended([started.load for started in finished]) + LoadReport(
            prefetched_bytes=prefetched * self._record_bytes,
            streamed_bytes=(len(finished) - prefetched) * self._record_bytes,
        )

    def _ended(self, loads: Sequence[Load]) -> LoadReport:
        failed = sum(load.error is not None for load in loads)
        return LoadReport(loads=len(loads), loaded_bytes=len(loads) * self._record_bytes, failed=failed)


def local_pools(
    store: Store, slots: Mapping[RecordLayout, int], policy: str, io_cpus: set[int] | None
) -> dict[str, HostPool]:
    """By layer, one pool per record layout, all fed by one loader.

    Args:
        slots: how many each layout gets.
        policy: name of the eviction policy.
        io_cpus: where loader threads may run; None leaves them where the process runs.
    """
    operations = Operations(lambda: RecordLoader(store, cpus=io_cpus))
    pools: dict[RecordLayout, HostPool] = {}
    for layout, count in slots.items():
        members = PoolMembers.of(store.layers, layout)
        cache = ExpertCache(members.layer_of, count, create_policy(policy, members.layer_of))
        pools[layout] = LocalPool(members, HostMemory(layout, count), cache, operations)
    return {entry.name: pools[entry.layout] for entry in store.layers}
