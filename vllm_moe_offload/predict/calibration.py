"""Turns scores that are good for an order only into probabilities, by counting what happened."""

import numpy as np
from numpy.typing import NDArray

from .base import Probabilities

_FADING = 0.999
"""Per update, so that about the last thousand steps count."""
_GUESS_WORTH = 4.0
"""Observations per centre that the first guess counts for."""
_KEEPS_ORDER = 1e-6
"""What the curve rises by at least, all in all: what was ranked stays ranked."""

Numbers = NDArray[np.floating]


class Calibration:
    """How often an expert was used that had such a score: a rising curve through counts that fade.

    Args:
        centres: scores at which is counted, ascending.
        first_guess: the curve before anything has been learned. A few dozen tokens replace it.
    """

    def __init__(self, centres: Numbers, first_guess: Numbers):
        self._centres = centres
        self._edges = (centres[1:] + centres[:-1]) / 2
        self._seen = np.full(len(centres), _GUESS_WORTH)
        self._used = _GUESS_WORTH * first_guess
        self.curve = first_guess.astype(np.float32)
        """Probability at each centre."""

    def probabilities(self, scores: Numbers) -> Probabilities:
        """float32, of the shape of ``scores``."""
        return np.interp(scores, self._centres, self.curve).astype(np.float32)

    def learn(self, scores: Numbers, observed: NDArray[np.bool_]) -> None:
        """What became of experts that had these scores: arrays of one shape."""
        places, count = np.searchsorted(self._edges, scores.ravel()), len(self._seen)
        self._seen = _FADING * self._seen + np.bincount(places, minlength=count)
        self._used = _FADING * self._used + np.bincount(places[observed.ravel()], minlength=count)
        rising = np.maximum.accumulate(self._used / self._seen) + _KEEPS_ORDER * np.linspace(0, 1, count)
        self.curve = rising.astype(np.float32)


class PendingFeedback:
    """What a step has predicted of the layers ahead, until they are observed."""

    def __init__(self, experts: int):
        """``experts``: of a layer."""
        self._experts = experts
        self._waiting: dict[int, list[tuple[Calibration, Numbers]]] = {}

    def add(self, layer: int, calibration: Calibration, scores: Numbers) -> None:
        """``scores`` ``[B, E]`` were predicted for ``layer``; ``calibration`` learns from what is observed."""
        self._waiting.setdefault(layer, []).append((calibration, scores))

    def observe(self, layer: int, experts: NDArray[np.integer]) -> None:
        """``layer`` has chosen ``experts`` ``[B, K]``."""
        if waiting := self._waiting.pop(layer, None):
            observed = np.zeros((len(experts), self._experts), bool)
            np.put_along_axis(observed, experts.astype(np.intp), True, axis=1)
            for calibration, scores in waiting:
                calibration.learn(scores, observed)


_MARGINS = 6 * np.sinh(np.linspace(-3, 3, 25)) / np.sinh(3)
"""Densest around zero, where the choice falls."""
_SHARES = np.linspace(0, 1, 33) ** 2


def margin_calibration() -> Calibration:
    """Of how far an expert's score lies above or below what it takes to be chosen, in spreads of the scores."""
    return Calibration(_MARGINS, 1 / (1 + np.exp(-2 * _MARGINS)))


def share_calibration(likely_predicted: list[float], likely_observed: list[float]) -> Calibration:
    """Of candidates' weighted votes. Counted at the squares of ``0, 1/32, … 1``, as ``kernels.vote`` expects.

    ``likely_observed``: the share of experts used, elsewhere, of those with votes of ``likely_predicted``.
    """
    return Calibration(_SHARES, np.interp(_SHARES, likely_predicted, likely_observed))
