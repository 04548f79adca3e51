"""Predicts by the routers themselves: what a layer's router reads, given to the routers of the layers ahead.

The literature's next-gate lookahead (Mixtral-Offloading, HOBBIT, Fate). It predicts nothing before the step's first
layer has been routed, and uses nothing of earlier tokens.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import Experts, ModelShape, Predictor, Probabilities, Step, TokenContext, Weights
from .calibration import Calibration, PendingFeedback, margin_calibration

_FARTHEST = 4
"""Layers ahead that have a calibration of their own; what lies farther shares the last one's."""
Array = NDArray[np.float32]

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


class Router(NamedTuple):
    """The router of one MoE layer."""

    logits: Callable[[Array], Array]
    """``[B, E]`` from what the router reads, ``[B, h]``."""
    scoring: str = "softmax"
    """One of SCORINGS."""
    bias: Array | None = None
    """``[E]``, added to the scores when experts are chosen: DeepSeek-V3's correction bias, not that of the logits."""
    groups: int = 1
    """Experts are chosen within the best ``kept_groups`` of so many groups of equal size."""
    kept_groups: int = 1

    def margins(self, hidden: Array, top_k: int) -> Array:
        """How far each expert is from changing sides, ``[B, E]``: the ``top_k`` chosen ones are above zero.

        In units of the scores' spread in the row, so that layers and tokens can be compared.
        """
        scores = self._scores(self.logits(hidden))
        spread = scores.std(axis=1, keepdims=True) + 1e-6
        if self.groups == 1:
            return (scores - _line(scores, top_k)) / spread
        grouped = scores.reshape(len(scores), self.groups, -1)
        best = np.sort(grouped, axis=2)
        standing = best[:, :, -1] if self.bias is None else best[:, :, -2:].sum(axis=2)
        standing -= _line(standing, self.kept_groups)
        open_to_choice = np.where(standing[:, :, None] > 0, grouped, -np.inf).reshape(scores.shape)
        own = scores - _line(open_to_choice, top_k)
        return np.minimum(own, standing.repeat(grouped.shape[2], axis=1)) / spread

    def _scores(self, logits: Array) -> Array:
        """What experts are ranked by. Without a bias the logits will do: every scoring keeps their order."""
        if self.bias is None:
            return logits
        if self.scoring == "softmax":
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        elif self.scoring == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = np.sqrt(np.logaddexp(logits, 0))
        return scores + self.bias


def _line(scores: Array, count: int) -> Array:
    """``[B, 1]``: half way between the last of the ``count`` best and the first of the others."""
    if count >= scores.shape[1]:
        return scores.min(axis=1, keepdims=True) - 1
    place = scores.shape[1] - count
    around = np.partition(scores, (place - 1, place), axis=1)
    above, below = around[:, place : place + 1], around[:, place - 1 : place]
    return np.where(np.isfinite(below), (above + below) / 2, above - 1)


class GatePredictor(Predictor):
    """``routers``: one per MoE layer. Only an engine can feed it, by ``note_router_input``."""

    def __init__(self, shape: ModelShape, routers: Sequence[Router]):
        super().__init__(shape)
        self.routers = routers
        self.calibrations = [[margin_calibration() for _ in range(_FARTHEST)] for _ in routers]
        self._read: Callable[[], Array] | None = None

    def note_router_input(self, read: Callable[[], Array]) -> None:
        """The next layer observed is about to route what ``read`` returns: float32 ``[B or more, h]``.

        ``read`` is called only where a step is predicted, and not after that layer has been observed.
        """
        self._read = read

    def begin(self, rows: Sequence[TokenContext]) -> "GateStep":
        return GateStep(self, len(rows))

    def calibration(self, layer: int, distance: int) -> Calibration:
        """Of predictions for ``layer`` made ``distance`` layers before it."""
        return self.calibrations[layer][min(distance, _FARTHEST) - 1]

    def router_input(self) -> Array:
        """What was announced by ``note_router_input``."""
        if self._read is None:
            raise ValueError("the gate predictor was not given what the routers read")
        read, self._read = self._read, None
        return read()


class GateStep(Step):
    """Keeps what it has predicted for each layer until that layer is observed, to calibrate."""

    def __init__(self, predictor: GatePredictor, rows: int):
        self._predictor, self._rows = predictor, rows
        self._layer = -1
        self._hidden: Array | None = None
        self._feedback = PendingFeedback(predictor.shape.experts)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._feedback.observe(layer, experts)
        self._layer = layer
        self._hidden = self._predictor.router_input()[: self._rows]

    def predict(self, layer: int) -> Probabilities:
        """Every expert alike before the first layer has been observed."""
        shape = self._predictor.shape
        if self._hidden is None:
            return np.full((self._rows, shape.experts), shape.top_k / shape.experts, np.float32)
        calibration = self._predictor.calibration(layer, layer - self._layer)
        margins = self._predictor.routers[layer].margins(self._hidden, shape.top_k)
        self._feedback.add(layer, calibration, margins)
        return calibration.probabilities(margins)
