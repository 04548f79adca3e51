"""What is worth loading before it is needed: arithmetic on probabilities, residency and measured speeds.

A load is admitted only if the stall it is expected to save exceeds the time its bytes are expected to take from other
loads. It must never touch a slot, a queue or a clock: the caller says how things stand, and executes the answer.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..load_report import LoadReport
from ..running_mean import blend

_PREDICTOR_SHARE = 0.1
"""Looking farther than one layer ahead may take this share of a layer's time."""
_WHOLE_LAYER_SHARE = 0.5
"""A prefill step expected to use this share of a layer's experts loads the layer whole, in order."""
_SURE = 0.95
"""Backing off raises the least probability no higher: an expert this sure to be used is always worth a new attempt,
unless the measured speeds alone say that loading it ahead does not pay."""
_WINDOW = 64
"""Outcomes judged together."""
_MOST_BACKOFF = 8.0
_RETRY_AFTER = 512
"""Steps of a pause, after which prefetching is tried again at the highest backoff."""
_STEPS_PER_HALVING = 256
"""Steps without a judgement after which backoff is halved: where nothing is admitted, nothing is judged.

Speculative loads of which fewer than ``_WINDOW`` end in so many steps cost little.
"""
_NONE = np.empty(0, np.int64)


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


@dataclass
class Estimates:
    """Running means the planner decides by. The initial values are used until the first measurement."""

    load_seconds: float
    """One record through an idle link."""
    layer_seconds: float
    """One layer of a step, stalls excluded."""
    chunk_seconds: float
    """The part of a transfer that cannot be interrupted: a speculative load may delay a demand by this much."""
    busy: float = 0.5
    """Share of time the link moves anything."""
    demands_per_layer: float = 0.5
    """Demand loads per layer of a step."""

    def layers_worth_asking(self, ask_seconds: float) -> int:
        """How many layers ahead to ask about: as far as a load takes, if asking is cheap beside the layers."""
        layers = 1 + int(self.load_seconds / max(self.layer_seconds, 1e-6))
        affordable = int(_PREDICTOR_SHARE * self.layer_seconds / ask_seconds) if ask_seconds else layers
        return max(1, min(layers, affordable))

    def note_load(self, seconds: float) -> None:
        """A record took ``seconds`` of the link's time."""
        assert seconds >= 0
        share = self.chunk_seconds / self.load_seconds
        self.load_seconds = blend(self.load_seconds, seconds)
        self.chunk_seconds = self.load_seconds * share

    def note_layer(self, seconds: float, link_seconds: float, demands: int) -> None:
        """A layer computed for ``seconds`` without stalls; the link was busy for ``link_seconds`` of layer and stall.

        ``link_seconds`` may exceed ``seconds``: then demands stalled the layer and the link is the bottleneck.
        """
        assert seconds >= 0 and demands >= 0
        self.layer_seconds = blend(self.layer_seconds, seconds)
        self.busy = blend(self.busy, min(1.0, link_seconds / seconds) if seconds > 0 else 1.0)
        self.demands_per_layer = blend(self.demands_per_layer, demands)


@dataclass
class Throttle:
    """How much one phase of prefetching backs off: a factor on costs. While ``off``, nothing is admitted.

    It grows when prefetches did not pay, up to a pause, and shrinks again as steps go by.

    From any state, whatever the outcomes: after at most ``_RETRY_AFTER`` steps it is not off, and after
    ``3 * _STEPS_PER_HALVING`` steps more without a judgement, backoff is 1.
    """

    backoff: float = 1.0
    off: bool = False
    _saved: float = 0.0
    _spent: float = 0.0
    _outcomes: int = 0
    _steps: int = 0
    """Since the pause began, the latest judgement, or the latest halving."""

    def begin_step(self) -> None:
        """A step of this phase starts."""
        self._steps += 1
        if self.off and self._steps >= _RETRY_AFTER:
            self.off, self._steps = False, 0
        elif not self.off and self._steps >= _STEPS_PER_HALVING:
            self.backoff, self._steps = max(1.0, self.backoff / 2), 0

    def note(self, saved_seconds: float, spent_seconds: float) -> None:
        """One prefetch ended: stall it saved, and time its bytes took from other loads."""
        self._saved += saved_seconds
        self._spent += spent_seconds
        self._outcomes += 1
        if self._outcomes >= _WINDOW:
            self._judge()
            self._saved, self._spent, self._outcomes = 0.0, 0.0, 0

    def _judge(self) -> None:
        if self._saved > 2 * self._spent:
            self.backoff = max(1.0, self.backoff / 2)
        elif self._saved < self._spent:
            self.off |= self.backoff >= _MOST_BACKOFF
            self.backoff = min(_MOST_BACKOFF, self.backoff * 2)
        assert 1 <= self.backoff <= _MOST_BACKOFF
        self._steps = 0


class Planner:
    """Admits prefetches and watches whether they pay."""

    def __init__(self, estimates: Estimates):
        self.estimates = estimates
        self._throttle = {phase: Throttle() for phase in Phase}

    def begin_step(self, phase: Phase) -> None:
        self._throttle[phase].begin_step()

    def is_off(self, phase: Phase) -> bool:
        """Whether prediction is turned off for this phase, because it has not paid."""
        return self._throttle[phase].off

    def plan(self, phase: Phase, outlook: Outlook, queue_seconds: float) -> NDArray[np.int64]:
        """Which experts of the layer to load now, best first.

        Args:
            queue_seconds: link time of everything already queued or in flight ahead of these loads.
        """
        assert outlook.layers_ahead >= 1
        assert outlook.probabilities.shape == outlook.absent.shape
        throttle = self._throttle[phase]
        if throttle.off:
            return _NONE
        if phase is Phase.PREFILL and outlook.probabilities.mean() >= _WHOLE_LAYER_SHARE:
            return np.flatnonzero(outlook.absent)
        least = self._least_probability(outlook.layers_ahead, queue_seconds, throttle.backoff)
        likely = ((outlook.probabilities > least) & outlook.absent).nonzero()[0]
        if len(likely) <= 1:
            return likely
        ranked = likely[(-outlook.probabilities[likely]).argsort(kind="stable")]
        load = self.estimates.load_seconds
        for place, probability in enumerate(outlook.probabilities[ranked].tolist()):
            ahead = queue_seconds + load * place
            if probability <= self._least_probability(outlook.layers_ahead, ahead, throttle.backoff):
                return ranked[:place]
        return ranked

    def note(self, phase: Phase, report: LoadReport) -> None:
        """What became of prefetches, and what loads took that the step demanded."""
        self._note_outcomes(phase, report)
        if report.demanded:
            self.estimates.note_load(report.demand_seconds / report.demanded)

    def _note_outcomes(self, phase: Phase, report: LoadReport) -> None:
        load, throttle = self.estimates.load_seconds, self._throttle[phase]
        for _ in range(report.useful):
            throttle.note(load, 0.0)
        for _ in range(report.late):
            throttle.note(max(0.0, load - report.late_seconds / report.late), 0.0)
        for _ in range(report.wasted):
            throttle.note(0.0, load * self.estimates.busy)

    def _least_probability(self, layers_ahead: int, queue_seconds: float, backoff: float) -> float:
        """In [0, 1]: an expert given more than this is worth loading behind ``queue_seconds`` of other loads.

        Then the stall it is expected to save exceeds, ``backoff`` times, the time it is expected to take from others:
        link time wasted where the link is busy, and a chunk in a demand's way.
        """
        measured = self._break_even(layers_ahead, queue_seconds, 1.0)
        backed_off = self._break_even(layers_ahead, queue_seconds, backoff)
        assert 0 <= measured <= 1 and 0 <= backed_off <= 1
        return max(measured, min(backed_off, _SURE))

    def _break_even(self, layers_ahead: int, queue_seconds: float, backoff: float) -> float:
        """The probability, at most 1, at which what is saved equals ``backoff`` times what is taken from others."""
        e = self.estimates
        lateness = max(0.0, queue_seconds + e.load_seconds - layers_ahead * e.layer_seconds)
        saved = max(0.0, e.load_seconds - lateness)
        wasted = backoff * e.load_seconds * e.busy
        met_by_demand = min(1.0, e.demands_per_layer * e.load_seconds / max(e.layer_seconds, 1e-9))
        in_the_way = backoff * met_by_demand * e.chunk_seconds / 2
        if saved <= in_the_way:
            return 1.0
        return (wasted + in_the_way) / (saved + wasted)
