"""Predicts nothing: the arm without prefetching."""

from collections.abc import Sequence

import numpy as np

from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import TokenContext


class NonePredictor(Predictor):
    """Every probability is zero."""

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        return _NoneStep(len(rows), self.shape)


class _NoneStep(Step):
    def __init__(self, rows: int, shape: ModelShape):
        self._size = (rows, shape.experts)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        pass

    def predict(self, layer: int) -> Probabilities:
        return np.zeros(self._size, np.float32)
