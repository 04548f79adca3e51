"""Turns scores that are good for an order only into probabilities, by counting what happened."""

import numpy as np
from numpy.typing import NDArray

from .base import Probabilities

_CENTRES = 6 * np.sinh(np.linspace(-3, 3, 25)) / np.sinh(3)
"""Margins at which it is counted: densest around zero, where the choice falls."""
_EDGES = (_CENTRES[1:] + _CENTRES[:-1]) / 2
_FIRST_GUESS = 1 / (1 + np.exp(-2 * _CENTRES))
_GUESS_WORTH = 4.0
"""Observations per centre that the first guess counts for."""
_FADING = 0.999
"""Per update, so that about the last thousand steps count."""


class MarginCalibration:
    """How often an expert was used whose score lay so far above, or below, what it takes to be chosen.

    A rising curve through counts that fade; it needs a few dozen tokens.
    """

    def __init__(self) -> None:
        self._seen = np.full(len(_CENTRES), _GUESS_WORTH)
        self._used = _GUESS_WORTH * _FIRST_GUESS
        self._curve = _FIRST_GUESS

    def probabilities(self, margins: NDArray[np.floating]) -> Probabilities:
        """float32, of the shape of ``margins``."""
        return np.interp(margins, _CENTRES, self._curve).astype(np.float32)

    def learn(self, margins: NDArray[np.floating], used: NDArray[np.bool_]) -> None:
        """What became of experts that had these margins: arrays of one shape."""
        places = np.searchsorted(_EDGES, margins.ravel())
        self._seen = _FADING * self._seen + np.bincount(places, minlength=len(_CENTRES))
        self._used = _FADING * self._used + np.bincount(places[used.ravel()], minlength=len(_CENTRES))
        self._curve = np.maximum.accumulate(self._used / self._seen)
