"""The runtime's slots as whoever looks ahead sees them: by layer in running order, experts by the model's numbers.

It must never decide anything: it translates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .cache.cache import ABSENT
from .prefetch.anticipation import Residency
from .prefetch.foresight import ForesightPolicy
from .runtime import OffloadRuntime, PooledLayer


class SlotsAhead(Residency):
    """Makes every pool's eviction heed what is expected of the running step.

    Args:
        layers: in the order in which they run.
        held: per layer, the model's numbers of the experts this worker holds, in its own order; None for all.
    """

    def __init__(
        self, runtime: OffloadRuntime, layers: Sequence[PooledLayer], held: Sequence[NDArray[np.int64] | None]
    ):
        self._runtime = runtime
        self._layers = layers
        self._held = held
        self._expected: list[NDArray[np.float32]] = []
        foresight = {id(pool): ForesightPolicy(pool.cache.policy, len(pool.cache.layer_of)) for pool in runtime.pools}
        for pool in runtime.pools:
            pool.cache.policy = foresight[id(pool)]
        for layer in layers:
            expected = foresight[id(layer.pool)].expected
            self._expected.append(expected[layer.first : layer.first + layer.experts])

    def absent(self, layer: int) -> NDArray[np.bool_]:
        pooled, held = self._layers[layer], self._held[layer]
        here = pooled.pool.cache.slot_of[pooled.first : pooled.first + pooled.experts] == ABSENT
        if held is None:
            return here
        absent = np.zeros(int(held.max()) + 1, dtype=bool)
        absent[held] = here
        return absent

    def expect(self, layer: int, probabilities: NDArray[np.float32]) -> None:
        held = self._held[layer]
        self._expected[layer][:] = probabilities if held is None else probabilities[held]

    def passed(self, layer: int) -> None:
        self._expected[layer][:] = 0

    def prefetch(self, layer: int, experts: NDArray[np.int64]) -> int:
        pooled, held = self._layers[layer], self._held[layer]
        own = experts if held is None else np.searchsorted(held, experts)
        return self._runtime.prefetch(pooled, own + pooled.first)

    def queued(self) -> int:
        return sum(not s.load.finished for pool in self._runtime.pools for s in pool.ahead.under_way)
