"""Predicts from the tokens of similar requests that took a similar way through the layers so far.

When a request arrives, the tokens of the requests nearest in meaning become its candidates, laid out by (layer,
expert). Every layer then only adds one stored column per chosen expert to each candidate's running match. A prediction
averages the candidates' own choices, weighted by ``exp(SHARPNESS * cosine)``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..history.store import HistoryStore, PastRequest
from ..history.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import UNKNOWN_TOKEN, RequestState, TokenContext

Array = NDArray[np.float32]

MAX_CANDIDATES = 8000
_SHARPNESS = np.float32(25.0)
_OTHER_TOKEN = np.float32(0.01)
"""Weight of a candidate with another token, beside 1 for the same, while no layer has been seen."""
_PRIOR = 2.0
"""How many average candidates the prior ``top_k / experts`` counts for."""
_MAX_REQUESTS = 256


class Candidates(NamedTuple):
    """The tokens a request is matched against, ``C`` of them."""

    columns: Array
    """``[L, E, C]``: routing weight of each expert, zero where not chosen. One column is contiguous."""
    inverse_norms: Array
    """``[L + 1, C]``: one over the length of each candidate's map up to, not including, a layer."""
    tokens: NDArray[np.int32]
    """``[C]``, UNKNOWN_TOKEN where not known."""


class NeighboursPredictor(Predictor):
    """Kernel average over candidates found by meaning. With an empty history every expert is equally likely."""

    def __init__(self, shape: ModelShape, history: HistoryStore, max_candidates: int = MAX_CANDIDATES):
        super().__init__(shape)
        self._history = history
        self._max_candidates = max_candidates

    def open(self, embedding: NDArray[np.floating] | None = None) -> RequestState:
        state = super().open(embedding)
        state.notes = gather(self.shape, self._history.nearest(embedding, _MAX_REQUESTS), self._max_candidates)
        return state

    def begin(self, rows: Sequence[TokenContext]) -> "NeighboursStep":
        return NeighboursStep(self.shape, rows)

    def close(self, state: RequestState, trace: Trace) -> None:
        self._history.add(trace)


class NeighboursStep(Step):
    """Running matches of the rows, grouped by request: rows of one request share their candidates."""

    def __init__(self, shape: ModelShape, rows: Sequence[TokenContext]):
        members: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            members.setdefault(id(row.state), []).append(index)
        self._experts = shape.experts
        self._rows = len(rows)
        self._groups = [_Group(shape, [rows[i] for i in indices], np.array(indices)) for indices in members.values()]

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        for group in self._groups:
            group.observe(layer, experts[group.indices], weights[group.indices])

    def predict(self, layer: int) -> Probabilities:
        probabilities = np.empty((self._rows, self._experts), np.float32)
        for group in self._groups:
            probabilities[group.indices] = group.predict(layer)
        return probabilities


class _Group:
    """Rows of one request."""

    def __init__(self, shape: ModelShape, rows: list[TokenContext], indices: NDArray[np.int64]):
        candidates = rows[0].state.notes
        assert isinstance(candidates, Candidates)
        self.indices = indices
        self._candidates = candidates
        self._prior = np.float32(shape.top_k / shape.experts)
        self._tokens = np.array([row.token for row in rows])
        self._matches = np.zeros((len(rows), len(candidates.tokens)), np.float32)
        self._norms = np.zeros(len(rows), np.float32)
        self._seen = 0

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        columns = self._candidates.columns[layer]
        weights = weights.astype(np.float32, copy=False)
        if len(experts) == 1:
            for expert, weight in zip(experts[0], weights[0], strict=True):
                self._matches[0] += weight * columns[expert]
        else:
            dense = np.zeros((len(experts), len(columns)), np.float32)
            np.put_along_axis(dense, experts, weights, axis=1)
            self._matches += dense @ columns
        self._norms += np.square(weights).sum(axis=1)
        self._seen = layer + 1

    def predict(self, layer: int) -> Probabilities:
        if not len(self._candidates.tokens):
            return np.full((len(self.indices), self._candidates.columns.shape[1]), self._prior, np.float32)
        shares = self._shares()
        total = shares.sum(axis=1)
        chosen = (self._candidates.columns[layer] > 0).astype(np.float32)
        average = (shares @ chosen.T) / total[:, None]
        independent = np.square(total) / np.square(shares).sum(axis=1)
        trust = (independent / (independent + _PRIOR)).astype(np.float32)[:, None]
        return trust * average + (1 - trust) * self._prior

    def _shares(self) -> Array:
        """Weight of every candidate ``[b, C]``, the best of each row having 1."""
        if self._seen == 0:
            same = (self._tokens[:, None] == self._candidates.tokens) & (self._tokens != UNKNOWN_TOKEN)[:, None]
            return np.where(same, np.float32(1), _OTHER_TOKEN)
        cosine = self._matches * self._candidates.inverse_norms[self._seen]
        cosine /= np.sqrt(self._norms)[:, None]
        cosine -= cosine.max(axis=1, keepdims=True)
        cosine *= _SHARPNESS
        return np.exp(cosine, out=cosine)


def gather(shape: ModelShape, requests: list[PastRequest], most: int) -> Candidates:
    """Lay out up to ``most`` tokens of ``requests``, the first requests first."""
    parts, room = [], most
    for past in requests:
        if room == 0:
            break
        parts.append((past.trace, min(room, past.trace.num_tokens)))
        room -= parts[-1][1]
    count = most - room
    columns = np.zeros((shape.layers, shape.experts, count), np.float32)
    tokens = np.full(count, UNKNOWN_TOKEN, np.int32)
    start = 0
    for trace, length in parts:
        stop = start + length
        experts = trace.experts[:length].transpose(1, 2, 0)
        weights = trace.weights[:length].transpose(1, 2, 0).astype(np.float32)
        np.put_along_axis(columns[:, :, start:stop], experts.astype(np.int64), weights, axis=1)
        if trace.tokens is not None:
            tokens[start:stop] = trace.tokens[:length]
        start = stop
    lengths = np.zeros((shape.layers + 1, count), np.float32)
    np.cumsum(np.square(columns).sum(axis=1), axis=0, out=lengths[1:])
    return Candidates(columns, 1 / np.sqrt(np.maximum(lengths, 1e-12)), tokens)
