"""FineMoE (EuroSys '26, arXiv 2502.05370) as a predictor: the single most similar stored map is the prediction.

Store capacity ``C`` = 1000 maps of single iterations. Semantic search (cosine of token embeddings) serves the layers
before anything has been observed; trajectory search (cosine of the concatenated observed rows) the others. After every
iteration the new map replaces the stored one of highest redundancy
``RDY = d/L * cos(semantic) + (L-d)/L * cos(map)``; while there is room it is appended.

Deviations from the paper:
- A map's row holds the renormalised weights of the chosen experts, not the full softmax, which no trace records. The
  paper's selection (shortest prefix with cumulative probability >= 1 - score, at least top_k experts) then always
  selects exactly the matched token's experts, which is what every positive probability returned here amounts to.
- Token embeddings are compared by identity: in decode they are context-free, so equal tokens have cosine 1; the
  cosine of different tokens is taken as 0. Ties go to the oldest map.
- Tokens of a prefill chunk are separate iterations, as in the released code.
- Which of its predictions are fetched, and what is evicted for them, is the planner's and the policy's decision here.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace
from .base import (
    UNKNOWN_TOKEN,
    Experts,
    ModelShape,
    Predictor,
    Probabilities,
    RequestState,
    Step,
    TokenContext,
    TokenMap,
    Weights,
)

_CAPACITY = 1000
_PREFETCH_DISTANCE = 3


class FineMoEPredictor(Predictor):
    """The expert map store and its two searches."""

    learns_from_each_token = True

    def __init__(self, shape: ModelShape, capacity: int = _CAPACITY, distance: int = _PREFETCH_DISTANCE):
        super().__init__(shape)
        self.capacity = capacity
        self.filled = 0
        self._semantic_share = distance / shape.layers
        self.columns = np.zeros((shape.layers, shape.experts, capacity), np.float32)
        self.lengths = np.zeros((shape.layers + 1, capacity), np.float32)
        """``[L + 1, C]``: squared length of each map up to, not including, a layer."""
        self.tokens = np.full(capacity, UNKNOWN_TOKEN)

    def fit(self, trace: Trace) -> None:
        """Insert every token of a trace, in order."""
        tokens = np.full(trace.num_tokens, UNKNOWN_TOKEN) if trace.tokens is None else trace.tokens
        for token, experts, weights in zip(tokens, trace.experts, trace.weights, strict=True):
            self.insert(int(token), TokenMap(experts, weights))

    def learn(self, state: RequestState, token: int, token_map: TokenMap) -> None:
        self.insert(token, token_map)

    def insert(self, token: int, token_map: TokenMap) -> None:
        """Store the map of one iteration."""
        token_map = TokenMap(token_map.experts, token_map.weights.astype(np.float32))
        if self.filled < self.capacity:
            place = self.filled
            self.filled += 1
        else:
            place = int(np.argmax(self._redundancy(token, token_map)))
        layers = np.arange(self.shape.layers)[:, None]
        self.columns[:, :, place] = 0
        self.columns[layers, token_map.experts, place] = token_map.weights
        self.lengths[1:, place] = np.cumsum(np.square(token_map.weights).sum(axis=1))
        self.tokens[place] = token

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        return _FineMoEStep(self, np.array([row.token for row in rows]))

    def _redundancy(self, token: int, token_map: TokenMap) -> NDArray[np.float32]:
        layers = np.arange(self.shape.layers)[:, None]
        stored = self.columns[layers, token_map.experts]
        match = np.einsum("lkc,lk->c", stored, token_map.weights, optimize=False)
        length = np.sqrt(self.lengths[-1] * np.square(token_map.weights).sum())
        semantic = (self.tokens == token) & (token != UNKNOWN_TOKEN)
        return self._semantic_share * semantic + (1 - self._semantic_share) * match / length


class _FineMoEStep(Step):
    def __init__(self, store: FineMoEPredictor, tokens: NDArray[np.integer]):
        self._store = store
        self._filled = store.filled
        self._matches = np.zeros((len(tokens), self._filled), np.float32)
        same = (tokens[:, None] == store.tokens[: self._filled]) & (tokens != UNKNOWN_TOKEN)[:, None]
        self._best = np.argmax(same, axis=1) if self._filled else np.zeros(len(tokens), np.int64)
        self._known = same.any(axis=1)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        if not self._filled:
            return
        columns = self._store.columns[layer, :, : self._filled]
        for row in range(len(experts)):
            self._matches[row] += weights[row].astype(np.float32) @ columns[experts[row]]
        # A row's own length scales all its cosines alike, so it cannot change which map is nearest.
        self._best = np.argmax(self._matches / np.sqrt(self._store.lengths[layer + 1, : self._filled]), axis=1)
        self._known[:] = True

    def predict(self, layer: int) -> Probabilities:
        if not self._filled:
            return np.zeros((len(self._best), self._store.shape.experts), np.float32)
        return np.where(self._known[:, None], self._store.columns[layer][:, self._best].T, 0).astype(np.float32)
