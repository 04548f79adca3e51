"""Loads that were started before anyone waited for them, and which of them were guesses nobody has used yet.

Bookkeeping of one pool: it must never wait, start a load, or read a clock.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..cache import ExpertCache
from ..cache.base import IntArray
from .loader import Load


class Started(NamedTuple):
    """A load under way. Its slot carries one pin until ``reap`` finds it finished."""

    load: Load
    expert: int
    """Flat id."""
    slot: int
    guess: bool


class LoadsAhead:
    """What is under way in one pool, and the guesses in it that have not been used."""

    def __init__(self, cache: ExpertCache):
        self._cache = cache
        self._unused: set[int] = set()
        self.under_way: list[Started] = []

    def add(self, loads: Sequence[Load], experts: IntArray, slots: IntArray, guess: bool) -> None:
        """``loads`` bring ``experts`` into ``slots``, which are pinned for them."""
        self.under_way += map(Started, loads, experts.tolist(), slots.tolist(), [guess] * len(loads))
        if guess:
            self._unused.update(experts.tolist())

    def reap(self) -> list[Load]:
        """Unpin what has arrived; what failed gives its slot back. Returns the finished loads."""
        finished = [started for started in self.under_way if started.load.finished]
        if finished:
            self.under_way = [started for started in self.under_way if not started.load.finished]
            self.drop([started for started in finished if started.load.error is not None])
            self._cache.release(np.array([s.slot for s in finished if s.load.error is None], dtype=np.int32))
        return [started.load for started in finished]

    def drop(self, started: Sequence[Started]) -> None:
        """These loads came to nothing: nobody has used their slots."""
        for _, expert, slot, _ in started:
            self._cache.release(np.array([slot]))
            self._cache.forget(np.array([expert]))
            self._unused.discard(expert)

    def withdrawn(self, started: Sequence[Started]) -> None:
        """``started`` will not be loaded after all."""
        gone = {id(one.load) for one in started}
        self.under_way = [one for one in self.under_way if id(one.load) not in gone]
        self.drop(started)

    def use(self, experts: IntArray) -> int:
        """A layer reads these distinct experts: how many of them are there by a guess, for the first time."""
        return self._forget(experts)

    def evict(self, experts: IntArray) -> int:
        """These experts have lost their slots: how many of them were guesses that nobody has used."""
        return self._forget(experts)

    def _forget(self, experts: IntArray) -> int:
        if not self._unused:
            return 0
        guessed = self._unused.intersection(experts.tolist())
        self._unused -= guessed
        return len(guessed)
