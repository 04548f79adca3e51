"""Predicts from the tokens of similar requests that took a similar way through the layers so far.

When a request arrives, the tokens of the requests nearest in meaning become its candidates, laid out by (layer,
expert). Every layer then only adds one stored column per chosen expert to each candidate's running match. A prediction
averages the candidates' own choices, weighted by ``exp(SHARPNESS * match)``, beside what the request has used lately.

The request's own latest tokens are candidates too: nothing resembles a request more than itself, and without a history
there is nothing else.

A layer's map is the root of its routing weights: a vector of length one, so that two maps match by their inner product.
Matches of earlier layers fade.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..history.store import HistoryStore, PastRequest
from ..history.trace import Trace
from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import UNKNOWN_TOKEN, RequestState, TokenContext, TokenMap

Array = NDArray[np.float32]

MAX_CANDIDATES = 8000
_SHARPNESS = np.float32(30.0)
_FADING = np.float32(0.8)
"""What an earlier layer's match counts beside the next one's."""
_OWN_SHARE = np.float32(0.2)
_OWN_SHARE_OF_DOUBT = np.float32(0.6)
"""Weight of the request's own frequencies beside neighbours that match, and what it grows by where none does."""
_OTHER_TOKEN = np.float32(0.01)
"""Weight of a candidate with another token, beside 1 for the same, while no layer has been seen."""
_MAX_REQUESTS = 256
_OWN_TOKENS = 512
_OWN_ROOM = 0.25
"""The request's own latest tokens may be so many of its candidates, and no larger a share of them."""


class Candidates:
    """The tokens a request is matched against: ``C`` of others, and up to ``room`` of its own, the latest.

    A layer of the others is laid out when it is first asked for.
    """

    def __init__(
        self, shape: ModelShape, parts: list[tuple[Trace, int]], room: int = 0, own: Iterable[tuple[int, TokenMap]] = ()
    ):
        """
        Args:
            parts: traces of others, and how many of each one's first tokens.
            own: tokens of the request itself, oldest first.
        """
        self._parts = parts
        starts = np.cumsum([0] + [length for _, length in parts]).tolist()
        self._places = [slice(*ends) for ends in pairwise(starts)]
        self._others, self._room = starts[-1], room
        self._columns = np.zeros((shape.layers, shape.experts, self._others + room), np.float32)
        self._experts = np.zeros((shape.layers, self._others + room, shape.top_k), np.intp)
        self._laid_out = np.zeros(shape.layers, bool)
        self._layers = np.arange(shape.layers)[:, None]
        self.own = deque(own, room)
        """The request's latest tokens and their maps, oldest first."""
        self._added, self._own_laid_out = len(self.own), 0
        self._tokens = np.full(self._others + room, UNKNOWN_TOKEN, np.int32)
        for (trace, length), place in zip(parts, self._places, strict=True):
            if trace.tokens is not None:
                self._tokens[place] = trace.tokens[:length]

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Of the candidates that are laid out; UNKNOWN_TOKEN where not known."""
        return self._tokens[: self._others + min(self._own_laid_out, self._room)]

    def add(self, token: int, token_map: TokenMap) -> None:
        """The request has run one more token: a candidate from the next step on, if need be in its oldest one's place.

        Cheap, as it is called for every token of a prefill.
        """
        self.own.append((token, token_map))
        self._added += 1

    def count(self) -> int:
        """Lay out what was added, and say how many candidates there are now: the first so many columns."""
        fresh = min(self._added - self._own_laid_out, len(self.own))
        if fresh:
            latest = [self.own[i] for i in range(-fresh, 0)]
            experts = np.stack([token_map.experts for _, token_map in latest], axis=2)
            weights = np.stack([token_map.weights for _, token_map in latest], axis=2)
            places = self._others + np.arange(self._added - fresh, self._added) % self._room
            if self._added > self._room:
                self._columns[:, :, places] = 0
            self._columns[self._layers[:, :, None], experts, places] = np.sqrt(weights, dtype=np.float32)
            self._experts[:, places] = experts.transpose(0, 2, 1)
            self._tokens[places] = [token for token, _ in latest]
            self._own_laid_out = self._added
        return self._others + len(self.own)

    def columns(self, layer: int) -> Array:
        """``[E, C + room]``: root of each expert's routing weight, zero where not chosen. One column is contiguous."""
        self._lay_out(layer)
        return self._columns[layer]

    def experts(self, layer: int) -> NDArray[np.intp]:
        """``[C + room, K]``: what each candidate chose."""
        self._lay_out(layer)
        return self._experts[layer]

    def _lay_out(self, layer: int) -> None:
        if self._laid_out[layer]:
            return
        for (trace, length), place in zip(self._parts, self._places, strict=True):
            self._experts[layer, place] = trace.experts[:length, layer]
            roots = np.sqrt(trace.weights[:length, layer].T.astype(np.float32))
            np.put_along_axis(self._columns[layer][:, place], self._experts[layer, place].T, roots, axis=0)
        self._laid_out[layer] = True


class NeighboursPredictor(Predictor):
    """Kernel average over candidates found by meaning, and the request's own tokens."""

    learns_from_each_token = True

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
        room = min(_OWN_TOKENS, int(_OWN_ROOM * self._max_candidates))

        def found(requests: list[PastRequest]) -> None:
            own = state.notes.own if isinstance(state.notes, Candidates) else ()
            state.notes = Candidates(self.shape, parts_of(requests, self._max_candidates - room), room, own)

        self._history.seek(state.embedding, _MAX_REQUESTS, found)

    def begin(self, rows: Sequence[TokenContext]) -> "NeighboursStep":
        return NeighboursStep(self.shape, rows)

    def learn(self, row: TokenContext, token_map: TokenMap) -> None:
        assert isinstance(row.state.notes, Candidates)
        row.state.notes.add(row.token, token_map)

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
        self.indices, self._experts = indices, shape.experts
        self._candidates, self._count = candidates, candidates.count()
        frequency = np.stack([row.frequency for row in rows])
        unearned = 1 - frequency.sum(axis=2, keepdims=True) / shape.top_k
        self._own = frequency + unearned * np.float32(shape.top_k / shape.experts)
        self._tokens = np.array([row.token for row in rows])
        self._matches = np.zeros((len(rows), self._count), np.float32)
        self._full_match = np.float32(0)
        self._asked: tuple[Array, Array] | None = None
        """Shares since the last layer was observed; several layers are asked about then."""

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        columns = self._candidates.columns(layer)[:, : self._count]
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
        self._asked = None

    def predict(self, layer: int) -> Probabilities:
        if not self._count:
            return self._own[:, layer].copy()
        self._asked = self._asked or self._shares()
        shares, best = self._asked
        experts = self._candidates.experts(layer)[: self._count]
        uses = [np.bincount(experts.reshape(-1), np.repeat(row, experts.shape[1]), self._experts) for row in shares]
        average = np.array(uses, np.float32)
        own_share = _OWN_SHARE + _OWN_SHARE_OF_DOUBT * (1 - best)
        return average + own_share * (self._own[:, layer] - average)

    def _shares(self) -> tuple[Array, Array]:
        """Weight of every candidate ``[b, C]``, 1 together; and how well the best of each row matches, of 1."""
        if self._full_match == 0:
            same = (self._tokens[:, None] == self._candidates.tokens) & (self._tokens != UNKNOWN_TOKEN)[:, None]
            shares, best = np.where(same, np.float32(1), _OTHER_TOKEN), np.ones((len(same), 1), np.float32)
        else:
            most = self._matches.max(axis=1, keepdims=True)
            nearness = self._matches - most
            nearness *= _SHARPNESS / self._full_match
            shares, best = np.exp(nearness, out=nearness), most / self._full_match
        shares /= shares.sum(axis=1, keepdims=True)
        return shares, best


def parts_of(requests: list[PastRequest], most: int) -> list[tuple[Trace, int]]:
    """Up to ``most`` tokens of ``requests``, the first requests first: traces, and how many tokens of each."""
    parts, room = [], most
    for past in requests:
        if room == 0:
            break
        parts.append((past.trace, min(room, past.trace.num_tokens)))
        room -= parts[-1][1]
    return parts
