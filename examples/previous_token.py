"""A predictor from outside of the package: the experts of the request's previous token, once more.

    PYTHONPATH=examples vllm-moe-offload replay TRACE.npz --predictor previous_token:PreviousToken
    PYTHONPATH=examples vllm serve MODEL --moe-offload-predictor previous_token:PreviousToken

How often a layer's experts do come again is counted while it runs, so that what it says are probabilities.
"""

from collections.abc import Sequence

import numpy as np

from vllm_moe_offload.predict.base import Experts, ModelShape, Predictor, Probabilities, Step, TokenContext, Weights


class PreviousToken(Predictor):
    """Counts, per layer, the experts of previous tokens, and how many of them the next token chose again."""

    def __init__(self, shape: ModelShape):
        super().__init__(shape)
        self.offered = np.full(shape.layers, 2.0 * shape.top_k)
        self.repeated = np.full(shape.layers, 1.0 * shape.top_k)

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        return _Step(self, rows)


class _Step(Step):
    def __init__(self, predictor: PreviousToken, rows: Sequence[TokenContext]):
        self._predictor = predictor
        layers, experts, _ = predictor.shape
        self._before = np.zeros((len(rows), layers, experts), bool)
        """``[B, L, E]``: what the previous token chose; nothing in prefill, where tokens run side by side."""
        for row, context in enumerate(rows):
            if context.previous is not None:
                chosen = context.previous.experts.astype(np.int64)
                np.put_along_axis(self._before[row], chosen, True, axis=1)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        before = self._before[:, layer]
        self._predictor.offered[layer] += before.sum()
        self._predictor.repeated[layer] += np.take_along_axis(before, experts.astype(np.int64), axis=1).sum()

    def predict(self, layer: int) -> Probabilities:
        _, experts, top_k = self._predictor.shape
        again = self._predictor.repeated[layer] / self._predictor.offered[layer]
        before = self._before[:, layer]
        count = before.sum(axis=1, keepdims=True)
        others = (top_k - count * again) / np.maximum(experts - count, 1)
        return np.where(before, again, others).astype(np.float32)
