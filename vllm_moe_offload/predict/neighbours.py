"""Predicts from the tokens of similar requests that took a similar way through the layers so far.

When a request arrives, the tokens of the requests nearest in meaning become its candidates, laid out by (layer,
expert). Every layer then only adds one stored column per chosen expert to each candidate's running match. A prediction
averages the candidates' own choices, weighted by ``exp(SHARPNESS * match)``, beside what the request has used lately.

A layer's map is the root of its routing weights: a vector of length one, so that two maps match by their inner product.
Matches of earlier layers fade.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..history.store import HistoryStore, PastRequest
from ..history.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import UNKNOWN_TOKEN, RequestState, TokenContext

Array = NDArray[np.float32]

MAX_CANDIDATES = 8000
_SHARPNESS = np.float32(30.0)
_FADING = np.float32(0.8)
"""What an earlier layer's match counts beside the next one's."""
_OWN_SHARE = np.float32(0.25)
"""Weight of the request's own frequencies beside the neighbours."""
_OTHER_TOKEN = np.float32(0.01)
"""Weight of a candidate with another token, beside 1 for the same, while no layer has been seen."""
_MAX_REQUESTS = 256


class Candidates:
    """The tokens a request is matched against, ``C`` of them. A layer is laid out when it is first asked for."""

    def __init__(self, shape: ModelShape, parts: list[tuple[Trace, int]]):
        """``parts``: traces, and how many of each one's first tokens."""
        self._shape, self._parts = shape, parts
        self._columns: dict[int, Array] = {}
        starts = np.cumsum([0] + [length for _, length in parts]).tolist()
        self._places = [slice(*ends) for ends in pairwise(starts)]
        self.tokens = np.full(starts[-1], UNKNOWN_TOKEN, np.int32)
        """``[C]``, UNKNOWN_TOKEN where not known."""
        for (trace, length), place in zip(parts, self._places, strict=True):
            if trace.tokens is not None:
                self.tokens[place] = trace.tokens[:length]

    def columns(self, layer: int) -> Array:
        """``[E, C]``: root of each expert's routing weight, zero where not chosen. One column is contiguous."""
        columns = self._columns.get(layer)
        if columns is None:
            columns = self._columns[layer] = np.zeros((self._shape.experts, len(self.tokens)), np.float32)
            for (trace, length), place in zip(self._parts, self._places, strict=True):
                roots = np.sqrt(trace.weights[:length, layer].T.astype(np.float32))
                np.put_along_axis(columns[:, place], trace.experts[:length, layer].T.astype(np.int64), roots, axis=0)
        return columns


class NeighboursPredictor(Predictor):
    """Kernel average over candidates found by meaning. With an empty history every expert is equally likely."""

    def __init__(self, shape: ModelShape, history: HistoryStore, max_candidates: int = MAX_CANDIDATES):
        super().__init__(shape)
        self._history = history
        self._max_candidates = max_candidates

    def open(self, embedding: NDArray[np.floating] | None = None) -> RequestState:
        state = super().open(embedding)
        self.find_candidates(state)
        return state

    def find_candidates(self, state: RequestState) -> None:
        """Lay out for ``state`` what resembles its request, and again whenever the history answers later."""

        def found(requests: list[PastRequest]) -> None:
            state.notes = gather(self.shape, requests, self._max_candidates)

        self._history.seek(state.embedding, _MAX_REQUESTS, found)

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
        frequency = np.stack([row.frequency for row in rows])
        unearned = 1 - frequency.sum(axis=2, keepdims=True) / shape.top_k
        self._own = frequency + unearned * np.float32(shape.top_k / shape.experts)
        self._tokens = np.array([row.token for row in rows])
        self._matches = np.zeros((len(rows), len(candidates.tokens)), np.float32)
        self._full_match = np.float32(0)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        columns = self._candidates.columns(layer)
        roots = np.sqrt(weights.astype(np.float32))
        self._matches *= _FADING
        if len(experts) == 1:
            for expert, root in zip(experts[0], roots[0], strict=True):
                self._matches[0] += root * columns[expert]
        else:
            dense = np.zeros((len(experts), len(columns)), np.float32)
            np.put_along_axis(dense, experts, roots, axis=1)
            self._matches += dense @ columns
        self._full_match = _FADING * self._full_match + 1

    def predict(self, layer: int) -> Probabilities:
        if not len(self._candidates.tokens):
            return self._own[:, layer].copy()
        shares = self._shares()
        chosen = (self._candidates.columns(layer) > 0).astype(np.float32)
        average = (shares @ chosen.T) / shares.sum(axis=1, keepdims=True)
        return (1 - _OWN_SHARE) * average + _OWN_SHARE * self._own[:, layer]

    def _shares(self) -> Array:
        """Weight of every candidate ``[b, C]``, the best of each row having 1."""
        if self._full_match == 0:
            same = (self._tokens[:, None] == self._candidates.tokens) & (self._tokens != UNKNOWN_TOKEN)[:, None]
            return np.where(same, np.float32(1), _OTHER_TOKEN)
        nearness = self._matches - self._matches.max(axis=1, keepdims=True)
        nearness *= _SHARPNESS / self._full_match
        return np.exp(nearness, out=nearness)


def gather(shape: ModelShape, requests: list[PastRequest], most: int) -> Candidates:
    """Up to ``most`` tokens of ``requests``, the first requests first."""
    parts, room = [], most
    for past in requests:
        if room == 0:
            break
        parts.append((past.trace, min(room, past.trace.num_tokens)))
        room -= parts[-1][1]
    return Candidates(shape, parts)
