"""The predictors to compare others with: nothing, what is used most, and what is used together."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, RequestState, Step, TokenContext, Weights

_FARTHEST = 4
"""Layers ahead the table covers; farther layers are predicted by popularity."""


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


class CoactivationPredictor(Predictor):
    """Mean over the chosen experts of the last observed layer of ``P(target expert | chosen expert)``, by weight."""

    def __init__(self, shape: ModelShape):
        super().__init__(shape)
        size = (_FARTHEST, shape.layers, shape.experts, shape.experts)
        self._together = np.full(size, shape.top_k / shape.experts, np.float32)
        self._uses = np.ones((shape.layers, shape.experts), np.float32)
        self._tokens = 1

    def fit(self, trace: Trace) -> None:
        """Count the pairs of a trace."""
        used = np.zeros((trace.num_tokens, self.shape.layers, self.shape.experts), np.float32)
        np.put_along_axis(used, trace.experts.astype(np.int64), 1.0, axis=2)
        self._uses += used.sum(axis=0)
        self._tokens += trace.num_tokens
        for ahead in range(1, _FARTHEST + 1):
            for layer in range(self.shape.layers - ahead):
                self._together[ahead - 1, layer] += used[:, layer].T @ used[:, layer + ahead]

    def end_request(self, state: RequestState, trace: Trace) -> None:
        self.fit(trace)

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        return _CoactivationStep(self, len(rows))

    def conditional(self, layer: int, experts: Experts, target: int) -> Probabilities:
        """``P(expert of target | each of experts [B, K] at layer)``, float32 ``[B, K, E]``."""
        together = self._together[target - layer - 1, layer, experts]
        return together / self._uses[layer, experts][:, :, None]

    def popularity(self, layer: int) -> Probabilities:
        """Share of tokens that use each expert of ``layer``, ``[E]``."""
        return self._uses[layer] / self._uses[layer].sum() * self.shape.top_k


class _CoactivationStep(Step):
    def __init__(self, table: CoactivationPredictor, rows: int):
        self._table, self._rows = table, rows
        self._layer = -1
        self._experts: Experts
        self._weights: Weights

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._layer, self._experts, self._weights = layer, experts, weights

    def predict(self, layer: int) -> Probabilities:
        if self._layer < 0 or layer - self._layer > _FARTHEST:
            return np.repeat(self._table.popularity(layer)[None].astype(np.float32), self._rows, axis=0)
        conditional = self._table.conditional(self._layer, self._experts, layer)
        return np.minimum((conditional * self._weights[:, :, None]).sum(axis=1, dtype=np.float32), 1)
