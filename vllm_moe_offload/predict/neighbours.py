"""Predicts from the tokens of similar requests that took a similar way through the layers so far.

When a request arrives, the tokens of the requests with the most similar prompt embeddings become its candidates, laid
out by (layer, expert). Every layer then only adds one stored column per chosen expert to each candidate's running
match. A prediction averages the candidates' own choices, weighted by ``exp(SHARPNESS * match)``, beside what the
request has used lately.

The request's own latest tokens are candidates too: nothing resembles a request more than itself, and without a history
there is nothing else.

A layer's map is the root of its routing weights: a vector of length one, so that two maps match by their inner product.
Matches of earlier layers fade.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..trace.history import HistoryStore, PastRequest
from ..trace.trace import Trace
from . import kernels
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
from .calibration import Calibration, PendingFeedback, share_calibration

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
_PREDICTED = [0, 0.01, 0.07, 0.13, 0.19, 0.25, 0.31, 0.37, 0.43, 0.49, 0.55, 0.61, 0.67, 0.73, 0.79, 0.85, 0.97, 1]
_OBSERVED_AT_START = [0, 0, 0.03, 0.08, 0.16, 0.27, 0.45, 0.59, 0.70, 0.77, 0.83, 0.87, 0.93, 0.96, 0.98, 0.99, 1, 1]
_OBSERVED = [0, 0, 0.03, 0.08, 0.16, 0.27, 0.35, 0.43, 0.51, 0.57, 0.65, 0.73, 0.80, 0.88, 0.94, 0.97, 0.99, 1]
"""Averages are too near to the middle: what was observed in traces of gpt-oss-20b, until counted anew."""
_STEPS_PER_FEEDBACK = 8
"""Between steps whose outcome is counted."""
_MAX_REQUESTS = 256
_OWN_TOKENS = 512
_OWN_ROOM = 0.25
"""The request's own latest tokens may be so many of its candidates, and no larger a share of them."""


class Candidates:
    """The tokens a request is matched against: ``C`` of others, and up to ``room`` of its own, the latest.

    A layer of the others is laid out when it is first used.
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
            tokens, maps = zip(*islice(self.own, len(self.own) - fresh, None), strict=True)
            experts = np.array([one.experts for one in maps], np.int64)
            roots = np.sqrt(np.array([one.weights for one in maps], np.float32))
            places = self._others + np.arange(self._added - fresh, self._added) % self._room
            kernels.lay_out(experts, roots, places, self._experts, self._columns)
            self._tokens[places] = tokens
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
    """Kernel average over candidates found by prompt embedding, and the request's own tokens."""

    learns_from_each_token = True

    def __init__(self, shape: ModelShape, history: HistoryStore, max_candidates: int = MAX_CANDIDATES):
        super().__init__(shape)
        self._history = history
        self._max_candidates = max_candidates
        self.calibrations = Calibrations(
            share_calibration(_PREDICTED, _OBSERVED_AT_START), share_calibration(_PREDICTED, _OBSERVED)
        )
        self._steps = 0

    def start_request(self, embedding: NDArray[np.floating] | None = None) -> RequestState:
        state = super().start_request(embedding)
        self.find_candidates(state)
        return state

    def find_candidates(self, state: RequestState) -> None:
        """Lay out for ``state`` what resembles its request, and again whenever the history answers later."""
        room = min(_OWN_TOKENS, int(_OWN_ROOM * self._max_candidates))

        def found(requests: list[PastRequest]) -> None:
            own = state.predictor_state.own if isinstance(state.predictor_state, Candidates) else ()
            state.predictor_state = Candidates(self.shape, parts_of(requests, self._max_candidates - room), room, own)

        self._history.seek(state.embedding, _MAX_REQUESTS, found)

    def begin(self, rows: Sequence[TokenContext]) -> "NeighboursStep":
        self._steps += 1
        return NeighboursStep(self.shape, rows, self.calibrations, learns=self._steps % _STEPS_PER_FEEDBACK == 0)

    def learn(self, state: RequestState, token: int, token_map: TokenMap) -> None:
        assert isinstance(state.predictor_state, Candidates)
        state.predictor_state.add(token, token_map)

    def end_request(self, state: RequestState, trace: Trace) -> None:
        self._history.add(trace)


class Calibrations(NamedTuple):
    """What averages over candidates are worth as probabilities."""

    at_start: Calibration
    """While no layer has been seen."""
    afterwards: Calibration


class NeighboursStep(Step):
    """Running matches of the rows, grouped by request: rows of one request share their candidates.

    Args:
        learns: what is predicted is compared with what is observed, to calibrate later steps.
    """

    def __init__(self, shape: ModelShape, rows: Sequence[TokenContext], calibrations: Calibrations, learns: bool):
        members: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            members.setdefault(id(row.state), []).append(index)
        self._experts = shape.experts
        self._rows = len(rows)
        self._calibrations = calibrations
        self._calibration = calibrations.at_start
        self._learns = learns
        self._feedback = PendingFeedback(shape.experts)
        self._groups = [
            _Group(shape, [rows[i] for i in indices], slice(None) if len(members) == 1 else np.array(indices))
            for indices in members.values()
        ]

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        self._feedback.observe(layer, experts)
        self._calibration = self._calibrations.afterwards
        for group in self._groups:
            group.observe(layer, experts[group.indices], weights[group.indices])

    def predict(self, layer: int) -> Probabilities:
        probabilities = np.empty((self._rows, self._experts), np.float32)
        predicted = np.empty_like(probabilities)
        for group in self._groups:
            predicted[group.indices], probabilities[group.indices] = group.predict(layer, self._calibration.curve)
        if self._learns:
            self._feedback.add(layer, self._calibration, predicted)
        return probabilities


class _Group:
    """Rows of one request."""

    def __init__(self, shape: ModelShape, rows: list[TokenContext], indices: slice | NDArray[np.int64]):
        candidates = rows[0].state.predictor_state
        assert isinstance(candidates, Candidates)
        self.indices = indices
        self._candidates, self._count = candidates, candidates.count()
        frequency = np.stack([row.frequency for row in rows])
        unearned = 1 - frequency.sum(axis=2, keepdims=True) / shape.top_k
        self._own = frequency + unearned * np.float32(shape.top_k / shape.experts)
        self._tokens = np.array([row.token for row in rows])
        self._matches = np.zeros((len(rows), self._count), np.float32)
        self._full_match = np.float32(0)
        self._shares_now: _Shares | None = None
        """Since the last layer was observed; several layers are predicted from them."""

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        chosen, shares = kernels.as_map(experts, weights)
        with np.errstate(invalid="ignore"):  # of a router that went wrong
            roots = np.sqrt(shares)
        kernels.follow(chosen, roots, self._candidates.columns(layer), _FADING, self._matches)
        self._full_match = _FADING * self._full_match + 1
        self._shares_now = None

    def predict(self, layer: int, curve: Array) -> tuple[Array, Probabilities]:
        """The rows' averages ``[b, E]``, and the same as probabilities by ``curve``."""
        own = np.ascontiguousarray(self._own[:, layer])
        if not self._count:
            return own, own
        self._shares_now = self._shares_now or self._shares()
        predicted, probabilities = np.empty_like(own), np.empty_like(own)
        kernels.vote(
            self._shares_now.of_candidates,
            self._candidates.experts(layer),
            own,
            self._shares_now.own,
            curve,
            predicted,
            probabilities,
        )
        return predicted, probabilities

    def _shares(self) -> "_Shares":
        if self._full_match == 0:
            same = (self._tokens[:, None] == self._candidates.tokens) & (self._tokens != UNKNOWN_TOKEN)[:, None]
            shares = np.where(same, np.float32(1), _OTHER_TOKEN)
            return _Shares(shares / shares.sum(axis=1, keepdims=True), np.full(len(same), _OWN_SHARE))
        shares, best = np.empty_like(self._matches), np.empty(len(self._matches), np.float32)
        kernels.weigh(self._matches, _SHARPNESS / self._full_match, best, shares)
        return _Shares(shares, _OWN_SHARE + _OWN_SHARE_OF_DOUBT * (1 - best / self._full_match))


class _Shares(NamedTuple):
    """Weights in the average."""

    of_candidates: Array
    """``[b, C]``, 1 together."""
    own: Array
    """``[b]``: of the request's frequencies beside all candidates."""


def parts_of(requests: list[PastRequest], most: int) -> list[tuple[Trace, int]]:
    """Up to ``most`` tokens of ``requests``, the first requests first: traces, and how many tokens of each."""
    parts, room = [], most
    for past in requests:
        if room == 0:
            break
        parts.append((past.trace, min(room, past.trace.num_tokens)))
        room -= parts[-1][1]
    return parts
