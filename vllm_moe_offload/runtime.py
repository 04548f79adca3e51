"""One object that brings experts into slots for the forward pass, whatever process it lives in.

It wires store, pools, cache and loader together. It must never import vLLM or torch, and never let a kernel read a
slot that is not pinned and loaded.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cache import Acquisition, ExpertCache, create_policy
from .cache.base import IntArray
from .cache.cache import ABSENT
from .devices import HostPool
from .errors import LoadError
from .observe import Counters
from .prefetch.ahead import LoadsAhead
from .prefetch.anticipation import Anticipation
from .prefetch.loader import Load, RecordLoader
from .prefetch.waves import group_rows, streams
from .store.layout import RecordLayout
from .store.reader import Store


class Wave(NamedTuple):
    """A part of a step that one kernel call computes: its experts are loaded and pinned until the next wave."""

    rows: NDArray[np.int64] | None
    """Which rows of the batch, or None for all of them."""
    slots: NDArray[np.int32]
    """``[rows, top_k]``: the slot of every chosen expert; -1 where the choice is not this worker's."""


@dataclass
class SlotPool:
    """The slots of all layers whose records have one layout, and who is in them."""

    memory: HostPool
    cache: ExpertCache
    ahead: LoadsAhead


@dataclass(frozen=True)
class PooledLayer:
    """A layer as the runtime sees it. Its experts are the flat ids ``first … first + experts - 1`` of its pool."""

    name: str
    index: int
    """Position in the store."""
    pool: SlotPool
    first: int
    experts: int

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.arange(self.first, self.first + self.experts)

    @property
    def span(self) -> range:
        """Its ids."""
        return range(self.first, self.first + self.experts)


class OffloadRuntime:
    """Serves the experts a forward pass asks for, from slots if they are there and from the store if not.

    One forward pass runs at a time; the calling thread is always the same. Loads run on the loader's threads.

    Args:
        store: complete and verified records of every layer.
        slots: how many slots each record layout gets.
        policy: name of the eviction policy.
        io_cpus: where loader threads may run; None leaves them where the process runs.
    """

    anticipation: Anticipation | None = None
    """Whoever looks ahead, if anyone: told what became of its guesses, and asked for more before a layer computes."""

    def __init__(self, store: Store, slots: Mapping[RecordLayout, int], policy: str, io_cpus: set[int] | None = None):
        self.store = store
        self.counters = Counters()
        self.loader = RecordLoader(store, cpus=io_cpus)
        self.pools: list[SlotPool] = []
        self.layers: dict[str, PooledLayer] = {}
        self._following: dict[str, PooledLayer] = {}
        self._failures: list[LoadError] = []
        self._failed_rows: set[int] = set()
        for layout, count in slots.items():
            self._add_pool(layout, count, policy)

    def _add_pool(self, layout: RecordLayout, slots: int, policy: str) -> None:
        entries = [(index, entry) for index, entry in enumerate(self.store.layers) if entry.layout == layout]
        layer_of = np.repeat([index for index, _ in entries], [entry.experts for _, entry in entries])
        cache = ExpertCache(layer_of, slots, create_policy(policy, layer_of))
        pool = SlotPool(HostPool(layout, slots), cache, LoadsAhead(cache))
        self.pools.append(pool)
        first = 0
        previous: PooledLayer | None = None
        for index, entry in entries:
            layer = self.layers[entry.name] = PooledLayer(entry.name, index, pool, first, entry.experts)
            if previous is not None:
                self._following[previous.name] = layer
            previous, first = layer, first + entry.experts

    @property
    def resident_bytes(self) -> int:
        return sum(pool.memory.slots * pool.memory.layout.payload_bytes for pool in self.pools)

    @property
    def slots(self) -> int:
        return sum(pool.memory.slots for pool in self.pools)

    def begin_step(self) -> None:
        """A forward pass over scheduled tokens starts."""
        self.counters.steps += 1
        for pool in self.pools:
            pool.cache.begin_step()

    def load_everything(self) -> None:
        """Fill every slot: expert ``i`` of a pool goes to its slot ``i`` for good. For budgets that hold all experts.

        Raises:
            LoadError: a record could not be read.
        """
        for pool in self.pools:
            layers = [layer for layer in self.layers.values() if layer.pool is pool]
            for layer in layers:
                acquired = pool.cache.acquire(layer.ids)
                loads = [
                    self._load(layer, expert, slot) for expert, slot in zip(layer.ids, acquired.slots, strict=True)
                ]
                self._demand(loads)
                for load in loads:
                    if load.error is not None:
                        raise load.error

    def serve(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> Iterator[Wave]:
        """Yield waves that together cover every row of ``chosen``; compute each before asking for the next.

        Args:
            chosen: ``[rows, top_k]`` expert numbers within the layer; negative ones are skipped.
        """
        mine = chosen[chosen >= 0]
        needed = np.flatnonzero(np.bincount(mine, minlength=layer.experts)) + layer.first
        slots = layer.pool.memory.slots
        if len(needed) > slots:
            yield from self._serve_in_waves(layer, chosen)
        elif streams(chosen.size, layer.experts, slots):
            yield from self._serve_streaming(layer, chosen, needed)
        else:
            yield from self._serve_at_once(layer, chosen, needed)

    def prefetch(self, layer: PooledLayer, experts: IntArray) -> int:
        """Start loading experts (flat ids, best first) on a guess, where slots can be spared. Returns how many."""
        pool = layer.pool
        room = (pool.memory.slots - layer.experts) // 2 - len(pool.ahead.under_way)
        if room <= 0:
            return 0
        admitted = pool.cache.admit(experts[:room])
        self._note_evicted(pool, admitted.evicted)
        self._start_ahead(layer, admitted, guess=True)
        self.counters.prefetches += len(admitted.missing)
        return len(admitted.missing)

    def take_failures(self) -> tuple[list[LoadError], set[int]]:
        """The loads that failed since the last call, and the rows of the batch whose results are therefore void."""
        failures, rows = self._failures, self._failed_rows
        self._failures, self._failed_rows = [], set()
        return failures, rows

    def close(self) -> None:
        self.loader.close()
        self.store.close()

    def _serve_at_once(self, layer: PooledLayer, chosen: NDArray[np.integer], needed: IntArray) -> Iterator[Wave]:
        cache = layer.pool.cache
        self._await_under_way(layer, needed)
        acquired = cache.acquire(needed)
        self._note_evicted(layer.pool, acquired.evicted)
        self.counters.hits += len(needed) - len(acquired.missing)
        failed = self._fetch(layer, acquired.missing, acquired.missing_slots)
        if self.anticipation is not None:
            self.anticipation.look_ahead()
        yield Wave(None, self._slots_of(layer, chosen))
        cache.release(acquired.slots)
        self._void(layer, chosen, failed)

    def _serve_streaming(self, layer: PooledLayer, chosen: NDArray[np.integer], needed: IntArray) -> Iterator[Wave]:
        """A long prefill: pass the layer's experts through a share of the slots and start on the next layer's."""
        cache = layer.pool.cache
        share = _stream_share(layer.pool.memory.slots, layer.experts)
        self._await_under_way(layer, needed)
        streamed = cache.stream(needed, share)
        self._note_evicted(layer.pool, streamed.evicted)
        if (streamed.slots == ABSENT).any():
            cache.release(streamed.slots[streamed.slots != ABSENT])
            cache.forget(streamed.missing)
            yield from self._serve_at_once(layer, chosen, needed)
            return
        self.counters.hits += len(needed) - len(streamed.missing)
        failed = self._fetch(layer, streamed.missing, streamed.missing_slots)
        self._start_following(layer, share)
        yield Wave(None, self._slots_of(layer, chosen))
        cache.release(streamed.slots)
        self._void(layer, chosen, failed)

    def _serve_in_waves(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> Iterator[Wave]:
        """Fewer slots than the step needs: rows are grouped so that the experts of two groups fit side by side."""
        cache = layer.pool.cache
        self._await_under_way(layer, layer.ids)
        slots, top_k = layer.pool.memory.slots, chosen.shape[1]
        overlap = slots >= 2 * top_k
        groups = group_rows(chosen, layer.experts, slots // 2 if overlap else slots)
        self.counters.waves += len(groups) - 1
        started: tuple[NDArray[np.int32], list[Load]] | None = None
        failed: list[Load] = []
        for number, rows in enumerate(groups):
            pinned, loads = started or self._start_group(layer, chosen[rows])
            failed += self._finish(loads)
            started = (
                self._start_group(layer, chosen[groups[number + 1]]) if overlap and number + 1 < len(groups) else None
            )
            yield Wave(rows, self._slots_of(layer, chosen[rows]))
            cache.release(pinned)
        self._void(layer, chosen, failed)

    def _start_group(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> tuple[NDArray[np.int32], list[Load]]:
        needed = np.flatnonzero(np.bincount(chosen[chosen >= 0], minlength=layer.experts)) + layer.first
        acquired = layer.pool.cache.acquire(needed)
        self._note_evicted(layer.pool, acquired.evicted)
        self.counters.hits += len(needed) - len(acquired.missing)
        self.counters.misses += len(acquired.missing)
        loads = [self._load(layer, e, s) for e, s in zip(acquired.missing, acquired.missing_slots, strict=True)]
        self.loader.start(loads)
        return acquired.slots, loads

    def _start_following(self, layer: PooledLayer, share: int) -> None:
        following = self._following.get(layer.name)
        if following is None:
            return
        absent = following.ids[following.pool.cache.slot_of[following.ids] == ABSENT]
        ahead = following.pool.cache.stream(absent, share)
        self._note_evicted(following.pool, ahead.evicted)
        self.counters.streamed += len(ahead.missing)
        self._start_ahead(following, ahead, guess=False)

    def _start_ahead(self, layer: PooledLayer, ahead: Acquisition, guess: bool) -> None:
        loads = [self._load(layer, e, s) for e, s in zip(ahead.missing, ahead.missing_slots, strict=True)]
        layer.pool.ahead.add(loads, ahead.missing, ahead.missing_slots, guess)
        self.loader.start(loads)

    def _await_under_way(self, layer: PooledLayer, needed: IntArray) -> None:
        """Wait for those of ``needed`` that are still being loaded, and unpin whatever has arrived.

        Waits for all that is under way where the pins of the rest could leave too few slots. Guesses at this layer
        that were wrong and have not begun to load are taken back.
        """
        pool, late, waited = layer.pool, 0, 0.0
        if under_way := pool.ahead.under_way:
            crowded = len(under_way) + len(needed) > pool.memory.slots
            wanted = set(needed.tolist())
            wrong = [s for s in under_way if s.guess and s.expert not in wanted and s.expert in layer.span]
            if wrong:
                taken = {id(load) for load in self.loader.withdraw([started.load for started in wrong])}
                pool.ahead.withdrawn([started for started in wrong if id(started.load) in taken])
                self.counters.prefetches -= len(taken)
            awaited = [s for s in pool.ahead.under_way if crowded or s.expert in wanted]
            late = sum(s.guess and s.expert in wanted and not s.load.finished for s in awaited)
            waited = self._join([started.load for started in awaited])
            self._account(pool.ahead.reap())
        if self.anticipation is not None:
            self._note_used(pool, needed, late, waited)

    def _note_used(self, pool: SlotPool, needed: IntArray, late: int, waited: float) -> None:
        assert self.anticipation is not None
        useful = pool.ahead.use(needed) - late
        if useful > 0:
            self.counters.prefetch_useful += useful
            self.anticipation.note_useful(useful)
        if late:
            self.counters.prefetch_late += late
            self.anticipation.note_late(late, waited)

    def _note_evicted(self, pool: SlotPool, evicted: IntArray) -> None:
        if self.anticipation is not None and len(evicted) and (wasted := pool.ahead.evict(evicted)):
            self.counters.prefetch_wasted += wasted
            self.anticipation.note_wasted(wasted)

    def _fetch(self, layer: PooledLayer, missing: IntArray, slots: IntArray) -> list[Load]:
        if not len(missing):
            return []
        self.counters.misses += len(missing)
        loads = [self._load(layer, expert, slot) for expert, slot in zip(missing, slots, strict=True)]
        self._demand(loads)
        return [load for load in loads if load.error is not None]

    def _finish(self, loads: list[Load]) -> list[Load]:
        self._join(loads)
        self._account(loads)
        return [load for load in loads if load.error is not None]

    def _load(self, layer: PooledLayer, expert: int, slot: int) -> Load:
        return Load(layer.index, int(expert) - layer.first, layer.pool.memory.slot(int(slot)))

    def _demand(self, loads: Sequence[Load]) -> None:
        started = time.perf_counter()
        self.loader.demand(loads)
        waited = time.perf_counter() - started
        self.counters.stall_seconds += waited
        self._account(loads)
        if self.anticipation is not None:
            self.anticipation.note_demand(len(loads), waited)

    def _join(self, loads: Sequence[Load]) -> float:
        started = time.perf_counter()
        self.loader.join(loads)
        waited = time.perf_counter() - started
        self.counters.stall_seconds += waited
        return waited

    def _account(self, loads: Sequence[Load]) -> None:
        self.counters.loads += len(loads)
        for load in loads:
            self.counters.loaded_bytes += self.store.layers[load.layer].layout.payload_bytes
            self.counters.failed_loads += load.error is not None

    def _void(self, layer: PooledLayer, chosen: NDArray[np.integer], failed: list[Load]) -> None:
        """Take back the slots of loads that failed, and remember the rows that would have needed them."""
        for load in failed:
            assert load.error is not None
            expert = np.array([layer.first + load.expert])
            if layer.pool.cache.slot_of[expert[0]] != ABSENT:  # a later wave may have taken the slot
                layer.pool.cache.forget(expert)
            self._failures.append(load.error)
            self._failed_rows.update(np.flatnonzero((chosen == load.expert).any(axis=1)).tolist())

    def _slots_of(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> NDArray[np.int32]:
        slots = layer.pool.cache.slot_of[layer.first + chosen]
        return np.where(chosen < 0, np.int32(-1), slots) if (chosen < 0).any() else slots


def _stream_share(slots: int, experts: int) -> int:
    """Slots a long prefill may use: a layer, two where that leaves most of the pool to decoding."""
    return min(2 * experts, max(experts, slots // 2))
