"""Predicts by asking the routers themselves: what a layer's router reads, given to the routers of the layers ahead.

The literature's next-gate lookahead (Mixtral-Offloading, HOBBIT, Fate). It knows nothing before the step's first layer
has been routed, and nothing of earlier tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .calibration import Calibration, Lessons, margin_calibration
from .context import TokenContext
from .routers import Array, Router

_FARTHEST = 4
"""Layers ahead that have a calibration of their own; what lies farther shares the last one's."""


class GatePredictor(Predictor):
    """``routers``: one per MoE layer. Only an engine can feed it: whoever runs the model calls ``see``."""

    def __init__(self, shape: ModelShape, routers: Sequence[Router]):
        super().__init__(shape)
        self.routers = routers
        self.calibrations = [[margin_calibration() for _ in range(_FARTHEST)] for _ in routers]
        self._read: Callable[[], Array] | None = None

    def see(self, read: Callable[[], Array]) -> None:
        """The next layer observed is about to route what ``read`` returns: float32 ``[B or more, h]``.

        ``read`` is called only where a step is predicted, and not after that layer has been observed.
        """
        self._read = read

    def begin(self, rows: Sequence[TokenContext]) -> "GateStep":
        return GateStep(self, len(rows))

    def calibration(self, layer: int, distance: int) -> Calibration:
        """Of predictions for ``layer`` made ``distance`` layers before it."""
        return self.calibrations[layer][min(distance, _FARTHEST) - 1]

    def hidden(self) -> Array:
        """What was announced by ``see``."""
        if self._read is None:
            raise ValueError("the gate predictor was not shown what the routers read")
        read, self._read = self._read, None
        return read()


class GateStep(Step):
    """Remembers what it has said of each layer until that layer shows what was true."""

    def __init__(self, predictor: GatePredictor, rows: int):
        self._predictor, self._rows = predictor, rows
        self._layer = -1
        self._hidden: Array | None = None
        self._lessons = Lessons(predictor.shape.experts)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._lessons.learn(layer, experts)
        self._layer = layer
        self._hidden = self._predictor.hidden()[: self._rows]

    def predict(self, layer: int) -> Probabilities:
        """Every expert alike before the first layer has been observed."""
        shape = self._predictor.shape
        if self._hidden is None:
            return np.full((self._rows, shape.experts), shape.top_k / shape.experts, np.float32)
        calibration = self._predictor.calibration(layer, layer - self._layer)
        margins = self._predictor.routers[layer].margins(self._hidden, shape.top_k)
        self._lessons.await_truth(layer, calibration, margins)
        return calibration.probabilities(margins)
