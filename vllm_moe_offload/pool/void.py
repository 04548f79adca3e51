"""Experts whose loads failed, and whose slots may still be held."""

from collections.abc import Iterable

import numpy as np

from ..cache import ExpertCache
from ..cache.cache import ABSENT


class VoidExperts(set[int]):
    """By their numbers in ``cache``: they have slots that hold something else than their records."""

    def __init__(self, cache: ExpertCache):
        super().__init__()
        self._cache = cache

    def add_released(self, experts: Iterable[int]) -> None:
        """A hold of ``experts`` has ended: empty the slots of all that no hold keeps any more."""
        self.update(experts)
        for expert in list(self):
            slot = self._cache.slot_of[expert]
            if slot == ABSENT or self._cache.pins[slot] == 0:
                self.remove(expert)
                if slot != ABSENT:
                    self._cache.forget(np.array([expert]))
