"""MoE-Infinity (arXiv 2401.14361) as a predictor: the most similar past request's activation counts say what comes.

A request's expert activation matrix (rEAM) counts its tokens per layer and expert, prefill and decode apart. The
collection (EAMC) keeps up to ``capacity`` = 120 of them; when full, a new one replaces the nearest by cosine. After
each layer the running iteration's matrix (rows of later layers zero) is matched by cosine; the best match's rows,
normalised, times the layer proximity ``1 - (i - l)/L`` are the likelihoods.

Deviations from the paper:
- A row's shares are multiplied by top_k and capped at 1, so that they can be read as probabilities of use.
- One match is returned ("several might be", says the paper).
- Before the first layer nothing can be matched; the sum of all stored matrices stands in.
- Eviction by pEAM priority is not used: the policy under test decides what to evict.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import PREFILL, Trace
from .base import Experts, ModelShape, Predictor, Probabilities, RequestState, Step, TokenContext, Weights

_CAPACITY = 120


class MoEInfinityPredictor(Predictor):
    """The expert activation matrix collection and its search."""

    def __init__(self, shape: ModelShape, capacity: int = _CAPACITY):
        super().__init__(shape)
        self.capacity = capacity
        self.matrices = np.zeros((0, shape.layers, shape.experts), np.float32)
        """``[C, L, E]`` rEAMs, each of unit length."""

    def fit(self, trace: Trace) -> None:
        """Add the matrices of every request of a trace."""
        for request in trace.requests():
            for tokens in _phases(request):
                self._insert(tokens)

    def end_request(self, state: RequestState, trace: Trace) -> None:
        self.fit(trace)

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        return _MoEInfinityStep(self.matrices, len(rows), self.shape)

    def _insert(self, experts: NDArray[np.integer]) -> None:
        counts = np.zeros((self.shape.layers, self.shape.experts), np.float32)
        for layer in range(self.shape.layers):
            counts[layer] = np.bincount(experts[:, layer].ravel(), minlength=self.shape.experts)
        counts /= np.linalg.norm(counts)
        if len(self.matrices) < self.capacity:
            self.matrices = np.concatenate([self.matrices, counts[None]])
        else:
            nearest = int(np.argmax(np.tensordot(self.matrices, counts, axes=2)))
            self.matrices[nearest] = counts


def _phases(request: Trace) -> list[NDArray[np.integer]]:
    if request.phase is None:
        return [request.experts] if request.num_tokens else []
    parts = [request.experts[request.phase == PREFILL], request.experts[request.phase != PREFILL]]
    return [part for part in parts if len(part)]


class _MoEInfinityStep(Step):
    def __init__(self, matrices: NDArray[np.float32], rows: int, shape: ModelShape):
        self._matrices, self._shape = matrices, shape
        self._matches = np.zeros((rows, len(matrices)), np.float32)
        self._last = -1

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._matches += self._matrices[:, layer][:, experts].sum(axis=2).T
        self._last = layer

    def predict(self, layer: int) -> Probabilities:
        rows = len(self._matches)
        if not len(self._matrices):
            return np.zeros((rows, self._shape.experts), np.float32)
        if self._last < 0:
            likely = np.repeat(self._matrices[:, layer].sum(axis=0)[None], rows, axis=0)
        else:
            likely = self._matrices[np.argmax(self._matches, axis=1), layer]
        shares = likely / np.maximum(likely.sum(axis=1, keepdims=True), 1e-12)
        proximity = 1 - (layer - max(self._last, 0)) / self._shape.layers
        return np.minimum(shares * self._shape.top_k * proximity, 1).astype(np.float32)
