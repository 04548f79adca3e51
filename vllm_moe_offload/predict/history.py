"""The predictor of this project: learned heads, and neighbours in their place while the history is young.

It owns the history. Every request that ends is remembered; ``HeadsTrainer`` learns from the whole history when it has
grown enough, at once (replay) or in another process (engine). Heads predict from the start of a step
as soon as there are any; what layers have shown is better understood by neighbours until heads have learned from much.
"""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..trace.history import HistoryStore
from ..trace.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, RequestState, Step, TokenContext, TokenMap, Weights
from .heads import HeadsPredictor
from .neighbours import MAX_CANDIDATES, NeighboursPredictor
from .network import NetworkSize, Parameters
from .token_vectors import LearnedVectors, TokenVectors
from .trainer import HeadsTrainer

_FIRST_TRAINING_TOKENS = 512
_UNSEEN_SHARE = 0.5
"""Train again when the heads have not learned from this share of the history: it has doubled, or, where it is full and
forgets as much as it remembers, half of it is new."""
_HEADS_ALONE_TOKENS = 30_000
"""Heads that have learned from so many tokens see no less than neighbours."""
_MOST_ROWS_OF_NEIGHBOURS = 4
"""Neighbours take their time for every request of a step, heads for all of them together."""


class HistoryPredictor(Predictor):
    """Neighbours first, then both, then heads.

    Args:
        vectors: makes the vectors of tokens, called at each training; learned ones when not given. A model's own
            embeddings never change, so the same object may be returned every time.
        learn_at_once: train within ``end_request`` when training is due. Otherwise someone else must train heads and
            call ``use_heads``.
        max_candidates: of the neighbours.
    """

    def __init__(
        self,
        shape: ModelShape,
        history: HistoryStore,
        vectors: Callable[[], TokenVectors] = LearnedVectors,
        learn_at_once: bool = False,
        max_candidates: int = MAX_CANDIDATES,
    ):
        super().__init__(shape)
        self.learns_from_each_token = True
        """Until heads do alone, and never again from then on."""
        self.history = history
        self.heads: HeadsPredictor | None = None
        self.trained_tokens = 0
        """Tokens in the history when the current heads were trained."""
        self._seen_tokens = 0
        """Of the tokens ever added to the history, those that were there when the current heads were trained."""
        self._neighbours = NeighboursPredictor(shape, history, max_candidates)
        self._vectors = vectors
        self._learn_at_once = learn_at_once
        self._lock = threading.Lock()
        """Requests may be closed in another thread than they are opened in."""
        self._remember_tokens(history.to_trace())

    @property
    def training_due(self) -> bool:
        """Whether too much of the history is new to the heads."""
        tokens = self.history.num_tokens
        unseen = max(self.history.tokens_added - self._seen_tokens, tokens - self.trained_tokens)
        return tokens >= _FIRST_TRAINING_TOKENS and unseen >= _UNSEEN_SHARE * tokens

    def use_heads(self, heads: HeadsPredictor, trained_tokens: int, unseen_tokens: int = 0) -> None:
        """Predict with these heads from the next step on, as after loading them from a file.

        Args:
            trained_tokens: of the history they were learned from.
            unseen_tokens: of the history as it is now, those they were not learned from.
        """
        self.heads, self.trained_tokens = heads, trained_tokens
        self._seen_tokens = self.history.tokens_added - unseen_tokens
        self.learns_from_each_token &= trained_tokens < _HEADS_ALONE_TOKENS

    def start_request(self, embedding: NDArray[np.floating] | None = None) -> RequestState:
        state = super().start_request(embedding)
        if self.learns_from_each_token:
            self._neighbours.find_candidates(state)
        return state

    def begin(self, rows: Sequence[TokenContext]) -> Step:
        if self.heads is None:
            return self._neighbours.begin(rows)
        at_start = self.heads.begin(rows)
        if self.learns_from_each_token and len(rows) <= _MOST_ROWS_OF_NEIGHBOURS:
            return _ColdStartStep(at_start, self._neighbours.begin(rows))
        return at_start

    def learn(self, state: RequestState, token: int, token_map: TokenMap) -> None:
        if self.learns_from_each_token:
            self._neighbours.learn(state, token, token_map)

    def end_request(self, state: RequestState, trace: Trace) -> None:
        with self._lock:
            self.history.add(trace)
        if self._learn_at_once and self.training_due:
            self.learn_all()

    def learn_all(self) -> None:
        """Train heads on the history as it stands, from start to end, and predict with them."""
        trace, vectors = self.history.to_trace(), self._vectors()
        size = NetworkSize(self.shape.layers, self.shape.experts, vectors.width)
        trainer = HeadsTrainer(Parameters.random(size, np.random.default_rng(0)), vectors, trace)
        while not trainer.finished:
            trainer.step()
        self.use_heads(HeadsPredictor(self.shape, trainer.parameters, trainer.vectors), trace.num_tokens)

    def _remember_tokens(self, trace: Trace) -> None:
        if trace.tokens is None:
            return
        tokens, from_end = np.unique(trace.tokens[::-1], return_index=True)
        latest = trace.num_tokens - 1 - from_end
        for place in np.argsort(latest):
            row = latest[place]
            self.memory.remember(int(tokens[place]), TokenMap(trace.experts[row].copy(), trace.weights[row].copy()))


class _ColdStartStep(Step):
    """Heads before the first layer, neighbours from then on."""

    def __init__(self, at_start: Step, afterwards: Step):
        self._current, self._afterwards = at_start, afterwards

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._current = self._afterwards
        self._current.observe(layer, experts, weights)

    def predict(self, layer: int) -> Probabilities:
        return self._current.predict(layer)
