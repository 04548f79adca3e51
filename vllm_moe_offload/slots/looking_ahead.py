"""The pools of slots as whoever looks ahead sees them: by layer in running order, experts by the model's numbers.

It must never decide anything: it translates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..observe import LoadReport
from ..prefetch.anticipation import Residency
from .base import SlotPool, Span


class SlotsAhead(Residency):
    """Makes every pool's eviction heed what is expected of the running step.

    Args:
        layers: pool and flat ids of each, in the order in which they run.
        held: per layer, the model's numbers of the experts this worker holds, in its own order; None for all.
        experts: of the model, per layer.
    """

    def __init__(self, layers: Sequence[tuple[SlotPool, Span]], held: Sequence[NDArray[np.int64] | None], experts: int):
        self._layers = layers
        self._experts = experts
        self._held = held
        self._pools = list({id(pool): pool for pool, _ in layers}.values())
        for pool in self._pools:
            pool.foresee()

    def absent(self, layer: int) -> NDArray[np.bool_]:
        pool, span = self._layers[layer]
        here, held = pool.absent(span), self._held[layer]
        if held is None:
            return here
        absent = np.zeros(self._experts, dtype=bool)
        absent[held] = here
        return absent

    def expect(self, layer: int, probabilities: NDArray[np.float32]) -> None:
        (pool, span), held = self._layers[layer], self._held[layer]
        pool.expect(span, probabilities if held is None else probabilities[held])

    def passed(self, layer: int) -> None:
        pool, span = self._layers[layer]
        pool.expect(span, 0.0)

    def prefetch(self, layer: int, experts: NDArray[np.int64]) -> LoadReport:
        (pool, span), held = self._layers[layer], self._held[layer]
        own = experts if held is None else np.searchsorted(held, experts)
        return pool.prefetch(span, own + span.start)

    def queued(self) -> int:
        return sum(pool.queued() for pool in self._pools)
