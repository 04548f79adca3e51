"""What a forward pass does with experts: it brings them into slots, wherever these are kept, and traces the routing.

It cuts steps up so that they fit. It must never yield a wave whose experts it does not hold.
"""

from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError
from ..load_report import LoadReport
from ..pool import Hold, SlotPool, Span
from ..pool.base import HostPool, PoolGoneError, PoolSource
from ..pool.waves import group_rows, order_arrivals
from ..prefetch.prefetcher import Prefetcher
from ..report.activity import Activity, LayerIds
from ..stats import Stats
from ..store.layout import RecordLayout
from ..store.reader import Store
from ..trace.recorder import routing_shares
from .routing_queue import RoutingQueue
from .tracer import Batch, RoutingTracer
from .warm_start import WarmStart
from .wave import SingleWave, Wave, Waves

SPLIT_SECONDS = 2e-3
"""Loads of a layer that take less are waited for together: up to two more kernel calls cost about a millisecond."""


Held = tuple[Hold, LoadReport]


@dataclass(eq=False)
class PooledLayer:
    """A layer as the runtime sees it. Its experts are the flat ids ``first … first + experts - 1`` of its layout.

    ``pool`` may be another one when a step begins, and after a wait for experts; its memory is always the same.
    """

    name: str
    index: int
    """Position in the store."""
    pool: SlotPool
    first: int
    experts: int

    @property
    def span(self) -> Span:
        """Its ids."""
        return range(self.first, self.first + self.experts)


class OffloadRuntime:
    """Serves the experts a forward pass asks for, from slots if they are there and from the store if not.

    One forward pass runs at a time; the calling thread is always the same.

    Args:
        store: complete and verified records of every layer; closed with the runtime.
        pools: of every layer, by its name in the store. Layers of one record layout may share one.
        stats: add up the reports of these pools.
        source: of the pools, if it may exchange them.
    """

    def __init__(
        self,
        store: Store,
        pools: Mapping[str, SlotPool],
        stats: Stats,
        source: PoolSource | None = None,
    ):
        self.store = store
        self.pools = list(dict.fromkeys(pools.values()))
        self.layers: dict[str, PooledLayer] = {}
        self.stats = stats
        self.tracer: RoutingTracer | None = None
        self.prefetcher: Prefetcher | None = None
        """For steps that are traced."""
        self.queue: RoutingQueue | None = None
        """Where a device manages the slots: takes steps and the ends of requests in place of tracer and prefetcher."""
        self.warm_start: WarmStart | None = None
        """Likewise: what to bring into slots when requests begin."""
        self._source = source
        self._batch: Batch | None = None
        """Of a step whose forward pass has not started yet."""
        self._num_rows = 0
        """Of the running pass, where it is traced."""
        self._traced: Batch | None = None
        """Whose pass it is."""
        self._following: dict[str, PooledLayer] = {}
        self._failures: list[LoadError] = []
        self._failed_rows: set[int] = set()
        self._slot_of = np.empty(max(entry.experts for entry in store.layers), dtype=np.int32)
        latest: dict[RecordLayout, PooledLayer] = {}
        for index, entry in enumerate(store.layers):
            before = latest.get(entry.layout)
            first = before.span.stop if before else 0
            layer = PooledLayer(entry.name, index, pools[entry.name], first, entry.experts)
            self.layers[entry.name] = latest[entry.layout] = layer
            if before:
                self._following[before.name] = layer
        self.activity = Activity(
            stats, [LayerIds(each.name, each.first, each.experts) for each in self.layers.values()]
        )
        self._layer = 0
        """Index of the one served last."""

    @property
    def slot_bytes(self) -> int:
        """Fast memory the experts may take."""
        return sum(pool.capacity * pool.layout.payload_bytes for pool in self.pools)

    @property
    def slots(self) -> int:
        """Slots that may be occupied."""
        return sum(pool.capacity for pool in self.pools)

    def begin_step(self, batch: Batch) -> None:
        """A step has been scheduled. Its forward pass follows, unless it has no tokens.

        In this order: the step before ends, where it was left without saying so; requests leave that have ended; pools
        are exchanged, if they have to be, and begin the step. When its pass starts, the tracer begins it, and then the
        prefetcher.
        """
        self.end_step()
        self.end_requests(batch.ended)
        if not batch.tokens:
            return
        self._batch = batch
        if self.queue is None:
            self.activity.begin_step(batch.scheduled)
        self.stats.steps += 1
        self.stats.tokens += batch.tokens
        if self._source is not None and self._source.begin_step():
            self._exchange_pools(self._source.pools)
        for pool in self.pools:
            self._note(pool.begin_step())

    def begin_pass(self) -> None:
        """The forward pass starts, its batch is put together. Without effect outside of a step, or the second time."""
        batch, self._batch = self._batch, None
        if batch is None or self.tracer is None:
            return
        rows = self.tracer.begin_step(batch)
        if not rows:
            return
        self._num_rows, self._traced = sum(len(part.tokens) for part in rows), batch
        if self.prefetcher is not None:
            batch.wait_for_tokens()
            self.prefetcher.begin_step(rows, self.tracer.embeddings)

    def observe(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """The router of a layer has chosen, whose experts are going to be asked for.

        Args:
            layer: counted in the order in which they run.
            experts: ``[rows or more, K]``, in the model's numbers; rows beyond those of the step are padding.
            weights: likewise.
        """
        if self._batch is not None:
            self.begin_pass()
        rows = self._num_rows
        if not rows or self.tracer is None:
            return
        experts, weights = experts[:rows], weights[:rows]
        self.tracer.observe(layer, experts, weights)
        if self.prefetcher is not None and self.prefetcher.predicts:
            self.prefetcher.observe(layer, experts, routing_shares(weights))

    def end_step(self) -> None:
        """The forward pass is over. Without effect where none has begun."""
        self._batch, self._num_rows = None, 0
        self.activity.end_step()
        traced, self._traced = self._traced, None
        if traced is not None:
            traced.wait_for_tokens()
        maps = None if self.tracer is None else self.tracer.end_step()
        if maps is not None and self.prefetcher is not None:
            self.prefetcher.end_step(maps)

    def end_requests(self, requests: Collection[str]) -> None:
        """Requests have finished or were aborted."""
        if self.queue is not None:
            self.queue.end_requests(requests)
            return
        self.activity.end_requests(requests)
        for request in requests:
            state = None if self.prefetcher is None else self.prefetcher.end_request(request)
            if self.tracer is not None:
                self.tracer.end_request(request, state)

    def load_everything(self) -> None:
        """Fill every slot: expert ``i`` of a pool goes to its slot ``i`` for good. For budgets that hold all experts.

        Raises:
            LoadError: a record could not be read.
        """
        for pool in self.pools:
            self._note(pool.load_all())

    def serve(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> Waves:
        """Waves that together cover every row of ``chosen``; compute each before asking for the next.

        Args:
            chosen: ``[rows, top_k]`` expert numbers within the layer, those of a row distinct; negative ones are
                skipped.
        """
        pool, needed = layer.pool, _needed(layer, chosen)
        self._layer = layer.index
        self.activity.use(layer.index, needed)
        if pool.streams(chosen.size, len(needed), layer.experts):
            return self._serve_streaming(layer, chosen, needed)
        capacity = pool.capacity
        if len(needed) > capacity:
            return self._serve_in_waves(layer, chosen, capacity)
        found = pool.find(needed)
        if found is None:
            if len(chosen) > 1:
                absent = pool.absent(layer.span)
                lacking = int(np.count_nonzero(absent[needed - layer.first]))
                if pool.seconds_to_load(lacking) >= SPLIT_SECONDS:
                    return self._serve_as_experts_arrive(layer, chosen, absent)
            return self._serve_at_once(layer, chosen, needed)
        slots, report = found
        self._note(report)
        self._look_ahead()
        return SingleWave(Wave(None, self._slots_of(layer, needed, slots, chosen)))

    @property
    def has_failures(self) -> bool:
        """Whether a load has failed since they were taken last."""
        return bool(self._failures)

    def take_failures(self) -> tuple[list[LoadError], set[int]]:
        """The loads that failed since the last call, and the rows of the batch whose results are therefore void."""
        failures, rows = self._failures, self._failed_rows
        self._failures, self._failed_rows = [], set()
        return failures, rows

    def close(self) -> None:
        """Nothing will be served any more."""
        for pool in self.pools:
            pool.close()
        self.store.close()

    def _serve_at_once(
        self, layer: PooledLayer, chosen: NDArray[np.integer], needed: NDArray[np.int64]
    ) -> Generator[Wave]:
        hold, report = self._ask(layer, lambda pool: pool.hold(layer.span, needed))
        try:
            self._note(report)
            self._look_ahead()
            yield Wave(None, self._slots_of(layer, hold.experts, hold.slots, chosen), hold.view)
        finally:
            self._release(layer, hold, chosen)

    def _serve_as_experts_arrive(
        self, layer: PooledLayer, chosen: NDArray[np.integer], absent: NDArray[np.bool_]
    ) -> Generator[Wave]:
        """Compute the rows whose experts are there while those of the others are loaded."""
        pool = layer.pool
        experts, groups = order_arrivals(chosen, absent)
        hold, report = pool.start_hold(layer.span, experts + layer.first)
        finished = False
        try:
            self._note(report)
            self._look_ahead()
            for number, (rows, count) in enumerate(groups, 1):
                if number < len(groups):
                    self._note(pool.wait_for(hold, count))
                else:
                    hold, report = self._finish_hold(layer, hold)
                    finished = True
                    self._note(report)
                yield Wave(rows, self._slots_of(layer, hold.experts, hold.slots, chosen[rows]))
        finally:
            if finished:
                self._release(layer, hold, chosen)
            else:
                self._note(pool.abandon(hold))

    def _serve_streaming(
        self, layer: PooledLayer, chosen: NDArray[np.integer], needed: NDArray[np.int64]
    ) -> Generator[Wave]:
        """A long prefill: pass the layer's experts through a share of the slots and start on the next layer's."""
        hold, report = self._ask(layer, lambda pool: pool.hold_streaming(layer.span, needed))
        try:
            self._note(report)
            if following := self._following.get(layer.name):
                self._note(following.pool.stream_ahead(following.span))
            yield Wave(None, self._slots_of(layer, hold.experts, hold.slots, chosen), hold.view)
        finally:
            self._release(layer, hold, chosen)

    def _serve_in_waves(self, layer: PooledLayer, chosen: NDArray[np.integer], capacity: int) -> Generator[Wave]:
        """Fewer slots than the step needs: rows are grouped so that the experts of two groups fit side by side."""
        self._note(layer.pool.settle(layer.span))
        overlap = capacity >= 2 * chosen.shape[1]
        groups = group_rows(chosen, layer.experts, capacity // 2 if overlap else capacity)
        self.stats.waves += len(groups) - 1
        started: Hold | None = None
        try:
            for number, rows in enumerate(groups):
                hold = started or self._start_hold(layer, chosen[rows])
                started = None
                hold, report = self._finish_hold(layer, hold)
                try:
                    self._note(report)
                    if overlap and number + 1 < len(groups):
                        started = self._start_hold(layer, chosen[groups[number + 1]])
                    yield Wave(rows, self._slots_of(layer, hold.experts, hold.slots, chosen[rows]))
                finally:
                    self._release(layer, hold, chosen)
        finally:
            if started is not None:
                self._note(layer.pool.abandon(started))

    def _start_hold(self, layer: PooledLayer, chosen: NDArray[np.integer]) -> Hold:
        hold, report = layer.pool.start_hold(layer.span, _needed(layer, chosen))
        self._note(report)
        return hold

    def _finish_hold(self, layer: PooledLayer, hold: Hold) -> Held:
        return self._ask(
            layer, lambda pool: pool.finish_hold(layer.span, hold), lambda pool: pool.hold(layer.span, hold.experts)
        )

    def _ask(
        self, layer: PooledLayer, ask: Callable[[SlotPool], Held], ask_other: Callable[[SlotPool], Held] | None = None
    ) -> Held:
        """Ask the layer's pool for a hold; if it is gone, the one that takes its place, which never heard of it."""
        try:
            return ask(layer.pool)
        except PoolGoneError as gone:
            if self._source is None:
                raise
            self._source.fail_over(gone)
            self._exchange_pools(self._source.pools)
            return (ask_other or ask)(layer.pool)

    def _exchange_pools(self, pools: Mapping[str, SlotPool]) -> None:
        """Serve from other pools, of the same memory, as far as they are others. Nothing may be held."""
        replaced: dict[SlotPool, SlotPool] = {}
        for name, layer in self.layers.items():
            old, new = layer.pool, pools[name]
            if new is not old:
                assert isinstance(old, HostPool) and isinstance(new, HostPool), "windows stay where they are"
                assert new.memory is old.memory, "kernels compute on the memory that they were given"
                layer.pool = replaced[old] = new
        if self.prefetcher is not None:
            for old, new in replaced.items():
                self.prefetcher.replace_pool(old, new)
        self.pools = list(dict.fromkeys(pools.values()))

    def _look_ahead(self) -> None:
        """The experts of a layer are there: prefetch for the next ones while it computes."""
        if self.prefetcher is not None:
            self.prefetcher.look_ahead()

    def _note(self, report: LoadReport) -> None:
        self.stats.add(report)
        self.activity.note(self._layer, report)
        if self.prefetcher is not None:
            self.prefetcher.note(report)

    def _release(self, layer: PooledLayer, hold: Hold, chosen: NDArray[np.integer]) -> None:
        """Let go of what has been computed with, and remember the rows that would have needed what failed to load."""
        layer.pool.release(hold)
        for expert, error in hold.failures:
            self._failures.append(error)
            self._failed_rows.update(np.flatnonzero((chosen == expert - layer.first).any(axis=1)).tolist())

    def _slots_of(
        self, layer: PooledLayer, experts: NDArray[np.integer], slots: NDArray[np.int32], chosen: NDArray[np.integer]
    ) -> NDArray[np.int32]:
        """The slot of every choice, -1 where it is negative. ``experts`` (distinct flat ids) are in ``slots``."""
        self._slot_of[experts - layer.first] = slots
        chosen_slots = self._slot_of[chosen]
        return np.where(chosen < 0, np.int32(-1), chosen_slots) if chosen.min(initial=0) < 0 else chosen_slots


def _needed(layer: PooledLayer, chosen: NDArray[np.integer]) -> NDArray[np.int64]:
    """The distinct flat ids of ``chosen``, ascending."""
    if len(chosen) == 1 and chosen.min(initial=0) >= 0:
        return np.sort(chosen[0]) + np.int64(layer.first)
    return np.flatnonzero(np.bincount(chosen[chosen >= 0], minlength=layer.experts)) + layer.first
