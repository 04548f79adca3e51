"""Loads that were started before anyone waited for them.

Bookkeeping of one pool: it must never wait, start a load, or read a clock.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..cache import ExpertCache
from ..cache.base import IntArray
from ..cache.outcomes import SpeculativeLoads
from .loader import Load


class Started(NamedTuple):
    """A load in flight. Its slot carries one pin until ``reap`` finds it finished."""

    load: Load
    expert: int
    """Flat id."""
    slot: int
    speculative: bool


class InFlightLoads:
    """What is being loaded into one pool ahead of its use.

    Args:
        speculative: those of the pool.
    """

    def __init__(self, cache: ExpertCache, speculative: SpeculativeLoads):
        self._cache = cache
        self._speculative = speculative
        self.loads: list[Started] = []

    def add(self, loads: Sequence[Load], experts: IntArray, slots: IntArray, speculative: bool) -> None:
        """``loads`` bring ``experts`` into ``slots``, which are pinned for them."""
        assert len(loads) == len(experts) == len(slots)
        self.loads += map(Started, loads, experts.tolist(), slots.tolist(), [speculative] * len(loads))
        if speculative:
            self._speculative.start(experts)

    def reap(self) -> list[Started]:
        """Unpin what has arrived; what failed gives its slot back. Returns what has finished."""
        finished = [started for started in self.loads if started.load.finished]
        if finished:
            self.loads = [started for started in self.loads if not started.load.finished]
            self.drop([started for started in finished if started.load.error is not None])
            self._cache.release(np.array([s.slot for s in finished if s.load.error is None], dtype=np.int32))
        return finished

    def drop(self, started: Sequence[Started]) -> None:
        """These loads came to nothing: nobody has used their slots."""
        for _, expert, slot, _ in started:
            self._cache.release(np.array([slot]))
            self._cache.forget(np.array([expert]))
            self._speculative.cancel(expert)

    def withdrawn(self, started: Sequence[Started]) -> None:
        """``started`` will not be loaded after all."""
        gone = {id(one.load) for one in started}
        self.loads = [one for one in self.loads if id(one.load) not in gone]
        self.drop(started)
