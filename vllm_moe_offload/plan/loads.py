"""How long this machine takes to bring experts of a store into slots: by an engine's own pools, without a model."""

import random
import time
from collections.abc import Sequence
from statistics import median
from typing import Self

import numpy as np

from ..pool import local_pools
from ..runtime import Batch, OffloadRuntime, PooledLayer
from ..stats import Stats
from ..store.pools import pools_of
from ..store.reader import Store

LOADER_THREADS = 4
AT_ONCE = LOADER_THREADS + 1
"""The thread that demands reads along with the loader's."""
SHARE = 0.25
"""Of the experts that have a slot while loads are timed."""


class Demands:
    """An engine's pools over ``store`` with a share of the experts. A context manager: its threads end with it.

    All slots are filled, and every record has been verified once, before the first demand.
    """

    def __init__(self, store: Store, share: float, seed: int = 0) -> None:
        self._draw = random.Random(seed)
        slots = {members.layout: max(1, int(members.experts * share)) for members in pools_of(store.layers)}
        self.slots = sum(slots.values())
        self._runtime = OffloadRuntime(store, local_pools(store, slots, "lru", None), Stats())

    def __enter__(self) -> Self:
        read_everything(self._runtime)
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._runtime.pools:
            pool.close()

    def load(self, count: int) -> tuple[float, int]:
        """Demand ``count`` absent experts of one layer: seconds the pass waits for them, and bytes read.

        Raises:
            LoadError: a record could not be read.
            ValueError: no layer has so many absent experts.
        """
        layers = [layer for layer in self._runtime.layers.values() if len(_absent(layer)) >= count]
        if not layers:
            raise ValueError(f"no layer has {count} absent experts")
        layer = self._draw.choice(layers)
        before = self._runtime.stats.stall_seconds
        _serve(self._runtime, layer, sorted(self._draw.sample(_absent(layer), count)))
        return self._runtime.stats.stall_seconds - before, count * layer.pool.layout.record_bytes


def read_everything(runtime: OffloadRuntime) -> None:
    """Have every record read once, as many at a time as fit. Raises LoadError."""
    for layer in runtime.layers.values():
        step = min(layer.experts, layer.pool.capacity)
        for first in range(0, layer.experts, step):
            _serve(runtime, layer, range(first, min(first + step, layer.experts)))


def demand_seconds(store: Store, pause: float, rounds: int = 24) -> list[float]:
    """Median seconds of a demand of 1, 2, … AT_ONCE records, a ``pause`` of computing before each. Raises LoadError."""
    taken: list[list[float]] = [[] for _ in range(AT_ONCE)]
    work = np.ones(1 << 20, np.float32)
    with Demands(store, SHARE) as demands:
        for _ in range(rounds):
            for count in range(1, AT_ONCE + 1):
                until = time.perf_counter() + pause
                while time.perf_counter() < until:
                    work.sum()
                taken[count - 1].append(demands.load(count)[0])
    return [median(seconds) for seconds in taken]


def finding_seconds(store: Store, top_k: int, steps: int = 60, seed: int = 0) -> float:
    """What a demanded record costs besides its load: a victim, a slot, and the books. From random decode steps."""
    quarter = {members.layout: max(2 * top_k, members.experts // 4) for members in pools_of(store.layers)}
    draw = np.random.default_rng(seed)
    runtime = OffloadRuntime(store, local_pools(store, quarter, "lfu", None), Stats())
    misses, seconds = [], []
    try:
        for _ in range(steps):
            runtime.begin_step(Batch(1))
            for layer in runtime.layers.values():
                chosen = draw.choice(layer.experts, (1, top_k), replace=False).astype(np.int32)
                missed, stalled = runtime.stats.misses, runtime.stats.stall_seconds
                began = time.perf_counter()
                for _ in runtime.serve(layer, chosen):
                    took = time.perf_counter() - began
                misses.append(runtime.stats.misses - missed)
                seconds.append(took - (runtime.stats.stall_seconds - stalled))
    finally:
        for pool in runtime.pools:
            pool.close()
    per_count = {count: median(s for s, m in zip(seconds, misses, strict=True) if m == count) for count in set(misses)}
    most = max(per_count)
    return max(0.0, (per_count[most] - per_count.get(0, 0.0)) / most) if most else 0.0


def fit_loads(seconds: Sequence[float]) -> tuple[float, float]:
    """Latency, and time per record, of demands of 1, 2, … records: the nearest straight line that is not below zero."""
    counts = np.arange(1, len(seconds) + 1)
    moving, latency = np.polyfit(counts, seconds, 1)
    if latency < 0 or moving <= 0:
        moving, latency = float(counts @ np.asarray(seconds) / (counts @ counts)), 0.0
    return float(latency), float(moving)


def _absent(layer: PooledLayer) -> list[int]:
    return layer.pool.absent(layer.span).nonzero()[0].tolist()


def _serve(runtime: OffloadRuntime, layer: PooledLayer, experts: Sequence[int]) -> None:
    """A step of one row that chooses ``experts``, numbers within the layer. Raises LoadError."""
    runtime.begin_step(Batch(1))
    for _ in runtime.serve(layer, np.array([experts], dtype=np.int32)):
        pass
    for failure in runtime.take_failures()[0]:
        raise failure
