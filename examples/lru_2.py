"""An eviction policy from outside of the package: LRU-2 (O'Neil, O'Neil and Weikum, SIGMOD 1993).

    PYTHONPATH=examples vllm-moe-offload replay TRACE.npz --policy lru_2:LeastRecentlyUsedTwice
    PYTHONPATH=examples vllm serve MODEL --moe-offload-policy lru_2:LeastRecentlyUsedTwice
    PYTHONPATH=examples vllm-moe-offload daemon --cache 32GiB --policy lru_2:LeastRecentlyUsedTwice

It evicts the expert whose last use but one lies furthest back: one use alone, by one odd token, keeps nothing.
"""

import numpy as np

from vllm_moe_offload.cache.base import EvictionPolicy, FloatArray, IntArray


class LeastRecentlyUsedTwice(EvictionPolicy):
    """Experts used only once go first, the least recently used of them before the others."""

    def __init__(self, layer_of: IntArray):
        self._last = np.zeros(len(layer_of))
        self._last_but_one = np.zeros(len(layer_of))
        self._uses = 0

    def begin_step(self) -> None:
        pass

    def use(self, experts: IntArray) -> None:
        self._uses += 1
        self._last_but_one[experts] = self._last[experts]
        self._last[experts] = self._uses

    def keep_scores(self, experts: IntArray) -> FloatArray:
        return self._last_but_one[experts] + self._last[experts] / (self._uses + 1)
