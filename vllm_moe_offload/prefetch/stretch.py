"""Steps in a row, compared by their length with what such steps usually take. Pure arithmetic on measured seconds."""

import math
import statistics
from bisect import insort
from collections.abc import Iterable, Mapping
from typing import NamedTuple

OUTLIER = 4.0
"""A step longer than so many times the median of its stretch was held up by something else; the rest is cut off."""
_BATCH = 8
"""Steps in a row of which the mean is taken to see how much lengths vary: neighbours may vary together."""
_EXACT = 16
"""A growing stretch takes its median anew with every step up to this length, and with every so manyth from then on."""


class TimedStep(NamedTuple):
    """One step as it was measured."""

    kind: int
    """Steps of one kind take about as long as each other."""
    seconds: float
    stalled: float
    """Seconds of it that were spent waiting for loads."""
    predictor_seconds: float
    """Seconds of it that were spent predicting."""


class Sums(NamedTuple):
    """Totals of a stretch, outliers cut off."""

    seconds: float
    usual: float
    """Seconds that the same steps usually take."""
    stalled: float
    predictor_seconds: float
    variance: float
    """Of one step's length as a multiple of the usual, as seen in the means of batches; infinite where there is one."""

    @property
    def level(self) -> float:
        """Length of the steps as a multiple of the usual."""
        return self.seconds / self.usual


def sum_up(steps: Iterable[TimedStep], usual: Mapping[int, float]) -> Sums:
    """The totals of a stretch of at least one step. ``usual``: seconds, of every kind in it."""
    steps = list(steps)
    ratios = [step.seconds / usual[step.kind] for step in steps]
    limit = OUTLIER * _lower_median(sorted(ratios))
    seconds = expected = stalled = predictor_seconds = 0.0
    for step in steps:
        cut = max(0.0, step.seconds - limit * usual[step.kind])
        seconds += step.seconds - cut
        expected += usual[step.kind]
        stalled += max(0.0, step.stalled - cut)
        predictor_seconds += max(0.0, step.predictor_seconds - cut)
    return Sums(seconds, expected, stalled, predictor_seconds, _variance([min(ratio, limit) for ratio in ratios]))


def robust_mean(seconds: Iterable[float]) -> float:
    """Mean of at least one length, outliers cut off."""
    ascending = sorted(seconds)
    limit = OUTLIER * _lower_median(ascending)
    return sum(min(one, limit) for one in ascending) / len(ascending)


class GrowingStretch:
    """The length of a stretch while it grows, outliers cut off as in ``sum_up``."""

    def __init__(self) -> None:
        self._ratios: list[float] = []
        self._limit = 0.0
        self.total = 0.0
        """Sum of the steps, each as a multiple of the usual."""
        self.outliers = 0
        """Outliers in a row, up to and including the latest step."""

    def __len__(self) -> int:
        return len(self._ratios)

    def add(self, ratio: float) -> None:
        """The next step took ``ratio`` times the usual."""
        insort(self._ratios, ratio)
        if len(self) <= _EXACT or len(self) % _EXACT == 0:
            self._limit = OUTLIER * _lower_median(self._ratios)
            self.total = sum(min(one, self._limit) for one in self._ratios)
        else:
            self.total += min(ratio, self._limit)
        self.outliers = self.outliers + 1 if ratio > self._limit else 0


def _variance(values: list[float]) -> float:
    batches = [sum(values[i : i + _BATCH]) / _BATCH for i in range(0, len(values) - _BATCH + 1, _BATCH)]
    if len(batches) < 2:
        return math.inf
    return _BATCH * statistics.variance(batches)


def _lower_median(ascending: list[float]) -> float:
    """Of two steps the shorter: one step alone never shows that the other was no outlier."""
    return ascending[(len(ascending) - 1) // 2]
