"""What is worth loading on a guess: pure arithmetic on probabilities, residency and measured speeds.

A load is admitted only if the stall it is expected to save exceeds the time its bytes are expected to take from other
loads. It must never touch a slot, a queue or a clock: whoever asks says how things stand, and executes the answer.
"""

from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .estimates import Estimates
from .restraint import Restraint

_WHOLE_LAYER_SHARE = 0.5
"""A prefill step expected to use this share of a layer's experts loads the layer whole, in order."""


class Phase(Enum):
    """Prefill and decode are planned, and judged, apart."""

    DECODE = 0
    PREFILL = 1


class Outlook(NamedTuple):
    """One layer ahead, as the planner is asked about it."""

    layers_ahead: int
    """From 1: how many layers run before its experts are needed."""
    probabilities: NDArray[np.float32]
    """``[E]``, merged over the running rows."""
    absent: NDArray[np.bool_]
    """``[E]``: has no slot and is not being loaded."""


class Planner:
    """Admits prefetches and watches whether they pay."""

    def __init__(self, estimates: Estimates):
        self.estimates = estimates
        self.useful = 0
        self.late = 0
        self.wasted = 0
        self._restraint = {phase: Restraint() for phase in Phase}

    def begin_step(self, phase: Phase) -> None:
        self._restraint[phase].begin_step()

    def is_off(self, phase: Phase) -> bool:
        """Whether prediction is turned off for this phase, because it has not paid."""
        return self._restraint[phase].off

    def plan(self, phase: Phase, outlook: Outlook, queue_seconds: float) -> NDArray[np.int64]:
        """Which experts of the layer to load now, best first.

        Args:
            queue_seconds: link time of everything already queued or in flight ahead of these loads.
        """
        restraint = self._restraint[phase]
        wanted = np.flatnonzero(outlook.absent & (outlook.probabilities > 0))
        if restraint.off or not len(wanted):
            return wanted[:0]
        if phase is Phase.PREFILL and outlook.probabilities.mean() >= _WHOLE_LAYER_SHARE:
            return np.flatnonzero(outlook.absent)
        order = wanted[np.argsort(-outlook.probabilities[wanted], kind="stable")]
        pays = self._benefit(outlook, order, queue_seconds) > restraint.caution * self._cost(outlook, order)
        return order[: int(np.argmin(pays))] if not pays.all() else order

    def note_useful(self, phase: Phase) -> None:
        """A prefetch was there when it was needed."""
        self.useful += 1
        self._restraint[phase].note(self.estimates.load_seconds, 0.0)

    def note_late(self, phase: Phase, waited_seconds: float) -> None:
        """A prefetch was still under way when it was needed, and was waited for."""
        self.late += 1
        self._restraint[phase].note(max(0.0, self.estimates.load_seconds - waited_seconds), 0.0)

    def note_wasted(self, phase: Phase) -> None:
        """A prefetch was evicted unused."""
        self.wasted += 1
        self._restraint[phase].note(0.0, self.estimates.load_seconds * self.estimates.busy)

    def _benefit(self, outlook: Outlook, order: NDArray[np.int64], queue_seconds: float) -> NDArray[np.floating]:
        """Stall each load is expected to save, if those before it in ``order`` are loaded too."""
        load = self.estimates.load_seconds
        arrival = queue_seconds + load * np.arange(1, len(order) + 1)
        lateness = np.maximum(0, arrival - outlook.layers_ahead * self.estimates.layer_seconds)
        return outlook.probabilities[order] * np.maximum(0, load - lateness)

    def _cost(self, outlook: Outlook, order: NDArray[np.int64]) -> NDArray[np.floating]:
        """Time each load is expected to take from others: link time wasted where busy, a chunk in a demand's way."""
        e = self.estimates
        transfer_layers = e.load_seconds / max(e.layer_seconds, 1e-9)
        met_by_demand = min(1.0, e.demands_per_layer * transfer_layers)
        wasted = (1 - outlook.probabilities[order]) * e.load_seconds * e.busy
        return wasted + met_by_demand * e.chunk_seconds / 2
