"""How much of a pool streams and speculative loads may take, and what becomes of the latter: the same in every pool.

It must never choose which slot is given to whom.
"""

from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from .base import IntArray


def stream_share(capacity: int, experts: int) -> int:
    """Slots a long prefill may use: those of two layers of ``experts``, so that one is read while the other computes.

    Where the pool is smaller than that, decoding loads its experts again afterwards: once, for what reading beside the
    computing of every layer saves.
    """
    return min(2 * experts, capacity)


def speculative_room(capacity: int, experts: int, in_flight: int) -> int:
    """How many more speculative loads for layers of ``experts`` experts the slots have room for.

    They hold at most half of what a whole layer leaves.
    """
    return max(0, (capacity - experts) // 2 - in_flight)


class SpeculativeLoads:
    """Experts that nobody has used since a prediction had them loaded.

    Each load ends in one way. It was *useful* if its expert was there when first used and *late* if it was still on
    its way then; *wasted* if the expert lost its slot unused; *cancelled* if it was not loaded after all.
    """

    def __init__(self) -> None:
        self._unused: set[int] = set()

    @property
    def unused(self) -> NDArray[np.int64]:
        """Their flat ids."""
        return np.array(sorted(self._unused), dtype=np.int64)

    def includes_any(self, experts: IntArray) -> bool:
        """Whether one of ``experts`` has not been used since."""
        return bool(self._unused) and not self._unused.isdisjoint(experts.tolist())

    def start(self, experts: IntArray) -> None:
        """``experts`` (absent until now) are going to be loaded on a prediction."""
        self._unused.update(experts.tolist())

    def use(self, experts: IntArray, but: Container[int] = ()) -> int:
        """A layer uses ``experts``, except those in ``but``. Returns how many loads that ends, useful or late."""
        if not self._unused:
            return 0
        ended = {expert for expert in self._unused.intersection(experts.tolist()) if expert not in but}
        self._unused -= ended
        return len(ended)

    def evict(self, experts: IntArray) -> int:
        """``experts`` have lost their slots. Returns how many loads were wasted."""
        return self.use(experts)

    def cancel(self, expert: int) -> None:
        """``expert`` does not come, if a speculative load was to bring it. Idempotent."""
        self._unused.discard(expert)

    def finish(self) -> int:
        """Nothing will be used any more. Returns how many loads were wasted."""
        wasted = len(self._unused)
        self._unused.clear()
        return wasted
