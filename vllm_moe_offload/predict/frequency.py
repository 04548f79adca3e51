"""Predicts what the request has used lately, and what requests use in general where it has said little yet."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..history.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import RequestState, TokenContext


class FrequencyPredictor(Predictor):
    """Decayed frequency within the request; the share it has not earned yet goes to overall popularity."""

    def __init__(self, shape: ModelShape):
        super().__init__(shape)
        self._counts = np.ones((shape.layers, shape.experts))

    def fit(self, trace: Trace) -> None:
        """Count the uses of a trace towards popularity."""
        for layer in range(self.shape.layers):
            self._counts[layer] += np.bincount(trace.experts[:, layer].ravel(), minlength=self.shape.experts)

    @property
    def popularity(self) -> NDArray[np.float32]:
        """``[L, E]``: share of all tokens that used each expert."""
        shares = self._counts / self._counts.sum(axis=1, keepdims=True)
        return (shares * self.shape.top_k).astype(np.float32)

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        frequency = np.stack([row.frequency for row in rows])
        earned = frequency.sum(axis=2, keepdims=True) / self.shape.top_k
        return _FrequencyStep(np.minimum(frequency + (1 - earned) * self.popularity, 1))

    def end_request(self, state: RequestState, trace: Trace) -> None:
        self.fit(trace)


class _FrequencyStep(Step):
    def __init__(self, probabilities: NDArray[np.float32]):
        self._probabilities = probabilities

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        pass

    def predict(self, layer: int) -> Probabilities:
        return self._probabilities[:, layer].copy()
