"""Windows of slots in a GPU's memory during a replay, under the policy that decides there. It has no clock."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..cache.outcomes import SpeculativeLoads
from ..errors import ConfigError
from ..windows.plan import WindowPlan
from ..windows.tables import ABSENT, WindowTables


def equal_windows(slots: int, layers: int, experts: int, top_k: int) -> list[int]:
    """Slots of each layer's window, of ``slots`` in all; the first layers have one more where they do not divide.

    Raises:
        ConfigError: a window would be too small for one token.
    """
    few, rest = divmod(min(slots, layers * experts), layers)
    if few < top_k:
        raise ConfigError(
            f"slots: {slots} are too few: on a GPU each of the {layers} layers has slots of its own and needs {top_k}; "
            f"give at least {layers * top_k}"
        )
    return [few + (layer < rest) for layer in range(layers)]


class Windows:
    """Which experts of each layer have a slot.

    Args:
        slots: of each layer's window.
        record_bytes: of one expert.
    """

    def __init__(self, slots: Sequence[int], experts: int, record_bytes: int):
        self.experts = experts
        self.smallest = min(slots)
        """Slots of the smallest window: a step that may use more experts is too wide for windows."""
        self._tables = [WindowTables(experts, count) for count in slots]
        self._lent = sorted(WindowPlan.of([experts] * len(slots), slots, [record_bytes]).lent)
        self._speculated = SpeculativeLoads()
        self._step = -1

    def begin_step(self) -> None:
        """A step that is not too wide starts."""
        self._step += 1

    def use(self, layer: int, ids: NDArray[np.int64]) -> tuple[int, int, int]:
        """A layer reads the distinct ``ids``: how many have to be loaded, and speculative loads right and wasted."""
        before = self._tables[layer].expert_of.copy()
        served = self._tables[layer].serve(ids[None], self._step)
        wasted = self._evicted(layer, before)
        return len(served.misses), self._speculated.use(self._flat(layer, ids)), wasted

    def absent(self, layer: int) -> NDArray[np.bool_]:
        """Which experts of a layer have no slot, ``[E]``."""
        return self._tables[layer].slot_of == ABSENT

    def speculate(self, layer: int, expert: int) -> int:
        """Give a slot to an absent expert that ``layer`` will probably use; returns how many that wasted."""
        before = self._tables[layer].expert_of.copy()
        self._tables[layer].admit(expert, self._step)
        wasted = self._evicted(layer, before)
        self._speculated.start(self._flat(layer, np.array([expert])))
        return wasted

    def lend(self) -> int:
        """A step too wide for windows passes: those that lie in its stages are empty. Returns wasted loads."""
        wasted = 0
        for layer in self._lent:
            before = self._tables[layer].expert_of.copy()
            self._tables[layer].forget()
            wasted += self._evicted(layer, before)
        return wasted

    def finish(self) -> int:
        """The replay is over. Returns how many speculative loads were never used."""
        return self._speculated.finish()

    def _evicted(self, layer: int, before: NDArray[np.integer]) -> int:
        gone = before[(before != self._tables[layer].expert_of) & (before != ABSENT)]
        return self._speculated.evict(self._flat(layer, gone))

    def _flat(self, layer: int, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        return layer * self.experts + ids.astype(np.int64)
