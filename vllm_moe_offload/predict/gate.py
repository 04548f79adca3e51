"""Predicts by asking the routers themselves: the hidden state now, through the router of a layer ahead."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import TokenContext


class GatePredictor(Predictor):
    """``routers``: float32 ``[L, E, h]``, one router matrix per MoE layer. Only an engine can feed it hidden states."""

    def __init__(self, shape: ModelShape, routers: NDArray[np.float32]):
        super().__init__(shape)
        self.routers = routers

    def begin(self, rows: Sequence[TokenContext]) -> "GateStep":
        return GateStep(self.routers, len(rows), self.shape)


class GateStep(Step):
    """Tell it the router's input at each layer with ``see``, before predicting."""

    def __init__(self, routers: NDArray[np.float32], rows: int, shape: ModelShape):
        self._routers, self._shape = routers, shape
        self._hidden = np.zeros((rows, routers.shape[2]), np.float32)

    def see(self, hidden: NDArray[np.float32]) -> None:
        """The rows' hidden states ``[B, h]`` as the current layer's router reads them."""
        self._hidden = hidden

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        pass

    def predict(self, layer: int) -> Probabilities:
        """Softmax of the router's logits times top_k, capped at 1; uniform before the first hidden state."""
        logits = self._hidden @ self._routers[layer].T
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return np.minimum(shares * self._shape.top_k, 1)
