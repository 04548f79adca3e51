"""What is worth loading on a guess: pure arithmetic on probabilities, residency and measured speeds.

A load is admitted only if the stall it is expected to save exceeds the time its bytes are expected to take from other
loads. It must never touch a slot, a queue or a clock: whoever asks says how things stand, and executes the answer.
"""

from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..observe import LoadReport
from .estimates import Estimates
from .restraint import Restraint

_WHOLE_LAYER_SHARE = 0.5
"""A prefill step expected to use this share of a layer's experts loads the layer whole, in order."""
_SURE = 0.95
"""Caution raises the least probability no higher: an expert this sure to be used is always worth a new attempt, unless
the measured speeds alone say that loading it ahead does not pay."""


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
        if restraint.off:
            return _NONE
        if phase is Phase.PREFILL and outlook.probabilities.mean() >= _WHOLE_LAYER_SHARE:
            return np.flatnonzero(outlook.absent)
        least = self._least_probability(outlook.layers_ahead, queue_seconds, restraint.caution)
        likely = ((outlook.probabilities > least) & outlook.absent).nonzero()[0]
        if len(likely) <= 1:
            return likely
        ranked = likely[(-outlook.probabilities[likely]).argsort(kind="stable")]
        load = self.estimates.load_seconds
        for place, probability in enumerate(outlook.probabilities[ranked].tolist()):
            ahead = queue_seconds + load * place
            if probability <= self._least_probability(outlook.layers_ahead, ahead, restraint.caution):
                return ranked[:place]
        return ranked

    def note(self, phase: Phase, report: LoadReport) -> None:
        """What became of prefetches, and what loads took that the step demanded."""
        self._note_outcomes(phase, report)
        if report.demanded:
            self.estimates.note_load(report.demand_seconds / report.demanded)

    def _note_outcomes(self, phase: Phase, report: LoadReport) -> None:
        load, restraint = self.estimates.load_seconds, self._restraint[phase]
        for _ in range(report.useful):
            restraint.note(load, 0.0)
        for _ in range(report.late):
            restraint.note(max(0.0, load - report.late_seconds / report.late), 0.0)
        for _ in range(report.wasted):
            restraint.note(0.0, load * self.estimates.busy)

    def _least_probability(self, layers_ahead: int, queue_seconds: float, caution: float) -> float:
        """In [0, 1]: an expert given more than this is worth loading behind ``queue_seconds`` of other loads.

        Then the stall it is expected to save exceeds, ``caution`` times, the time it is expected to take from others:
        link time wasted where the link is busy, and a chunk in a demand's way.
        """
        measured = self._break_even(layers_ahead, queue_seconds, 1.0)
        cautious = self._break_even(layers_ahead, queue_seconds, caution)
        return max(measured, min(cautious, _SURE))

    def _break_even(self, layers_ahead: int, queue_seconds: float, caution: float) -> float:
        """The probability, at most 1, at which what is saved equals ``caution`` times what is taken from others."""
        e = self.estimates
        lateness = max(0.0, queue_seconds + e.load_seconds - layers_ahead * e.layer_seconds)
        saved = max(0.0, e.load_seconds - lateness)
        wasted = caution * e.load_seconds * e.busy
        met_by_demand = min(1.0, e.demands_per_layer * e.load_seconds / max(e.layer_seconds, 1e-9))
        in_the_way = caution * met_by_demand * e.chunk_seconds / 2
        if saved <= in_the_way:
            return 1.0
        return (wasted + in_the_way) / (saved + wasted)


_NONE = np.empty(0, np.int64)
