"""Predicts from a table: how often tokens routed to one expert used each expert of a later layer."""

from collections.abc import Sequence

import numpy as np

from ..history.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import RequestState, TokenContext

_FARTHEST = 4
"""Layers ahead the table covers; farther layers are predicted by popularity."""


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
