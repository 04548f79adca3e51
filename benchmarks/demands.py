"""Demands of absent experts as an engine makes them: its own pools, slots, loader and threads, without a model."""

import random
from collections.abc import Sequence
from typing import Self

import numpy as np

from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import Batch, OffloadRuntime, PooledLayer
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store.pools import pools_of
from vllm_moe_offload.store.reader import Store


def read_everything(runtime: OffloadRuntime) -> None:
    """Have every record read once, as many at a time as fit. Raises LoadError."""
    for layer in runtime.layers.values():
        step = min(layer.experts, layer.pool.capacity)
        for first in range(0, layer.experts, step):
            _serve(runtime, layer, range(first, min(first + step, layer.experts)))


class Demands:
    """An engine's pools over `store` with a share of the experts. A context manager: its threads end with it.

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
        """Demand `count` absent experts of one layer: seconds the pass waits for them, and bytes read.

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
        return self._runtime.stats.stall_seconds - before, count * layer.pool.memory.layout.record_bytes


def _absent(layer: PooledLayer) -> list[int]:
    return layer.pool.absent(layer.span).nonzero()[0].tolist()


def _serve(runtime: OffloadRuntime, layer: PooledLayer, experts: Sequence[int]) -> None:
    """A step of one row that chooses `experts`, numbers within the layer. Raises LoadError."""
    runtime.begin_step(Batch(1))
    for _ in runtime.serve(layer, np.array([experts], dtype=np.int32)):
        pass
    for failure in runtime.take_failures()[0]:
        raise failure
