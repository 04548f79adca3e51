"""What a predictor says at every token and layer of a trace, asked exactly as the engine would ask it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..predict.base import UNKNOWN_TOKEN, Predictor, Step, TokenContext, TokenMap, union_probability
from ..trace.trace import PREFILL, Trace
from .accuracy import Accuracy
from .schedule import PREFILL_CHUNK

_ROWS = 256
"""Rows forecast together. Each still sees only its own past."""


@dataclass(frozen=True)
class Forecast:
    """Probabilities for every row of a trace, as seen from the given distances."""

    distances: tuple[int, ...]
    """Layers ahead, from 1. A layer nearer to the start than its distance is seen from the step's start."""
    probabilities: NDArray[np.float16]
    """``[T, len(distances), L, E]``."""

    def select(self, trace: Trace, requests: NDArray[np.integer]) -> "Forecast":
        """The forecast of ``trace.select(requests)``, this being that of ``trace``."""
        rows = [np.arange(trace.offsets[request], trace.offsets[request + 1]) for request in requests]
        return Forecast(self.distances, self.probabilities[np.concatenate(rows)])

    def at(self, *distances: int) -> "Forecast":
        """What is seen from these distances only, which are among those of this forecast."""
        slots = [self.distances.index(distance) for distance in distances]
        return Forecast(distances, self.probabilities[:, slots])

    def of_step(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Probability ``[len(distances), L, E]`` that any of these rows, run together, uses each expert."""
        return union_probability(self.probabilities[rows].astype(np.float32))


def forecast(
    predictor: Predictor, trace: Trace, distances: Sequence[int], accuracy: Accuracy | None = None
) -> Forecast:
    """Run ``predictor`` over ``trace``, request after request.

    ``accuracy``, where given, is updated with every prediction at its own distances too.
    """
    layers, experts, _ = trace.shape
    probabilities = np.zeros((trace.num_tokens, len(distances), layers, experts), np.float16)
    for start, request in zip(trace.offsets[:-1], trace.requests(), strict=True):
        for rows, contexts in _chunks(predictor, request):
            step = predictor.begin(contexts)
            kept = probabilities[start + rows.start : start + rows.stop]
            _run(step, request, rows, distances, kept, accuracy)
    return Forecast(tuple(distances), probabilities)


def _chunks(predictor: Predictor, request: Trace) -> Iterator[tuple[slice, list[TokenContext]]]:
    """Rows to forecast together, with their contexts; the predictor observes what became of them afterwards."""
    embedding = None if request.embeddings is None else request.embeddings[0].astype(np.float32)
    state = predictor.start_request(embedding)
    tokens = np.full(request.num_tokens, UNKNOWN_TOKEN) if request.tokens is None else request.tokens
    maps = [TokenMap(request.experts[row], request.weights[row]) for row in range(request.num_tokens)]
    for rows in _row_ranges(request, 1 if predictor.learns_from_each_token else _ROWS):
        if request.phase is not None and request.phase[rows.start] == PREFILL:
            contexts = state.contexts_side_by_side(tokens[rows])
            for row in range(rows.start, rows.stop):
                state.advance(int(tokens[row]), maps[row])
        else:
            contexts = []
            for row in range(rows.start, rows.stop):
                contexts.append(state.context(int(tokens[row])))
                state.advance(int(tokens[row]), maps[row])
        yield rows, contexts
        for row in range(rows.start, rows.stop):
            predictor.learn(state, int(tokens[row]), maps[row])
    predictor.end_request(state, request)


def _row_ranges(request: Trace, most: int) -> Iterator[slice]:
    start = 0
    while start < request.num_tokens:
        phase = None if request.phase is None else request.phase[start]
        stop = min(request.num_tokens, start + (PREFILL_CHUNK if phase == PREFILL else most))
        if request.phase is not None:
            other = np.flatnonzero(request.phase[start:stop] != phase)
            stop = start + int(other[0]) if len(other) else stop
        yield slice(start, stop)
        start = stop


def _run(
    step: Step,
    request: Trace,
    rows: slice,
    distances: Sequence[int],
    kept: NDArray[np.float16],
    accuracy: Accuracy | None,
) -> None:
    layers = request.num_layers
    experts = request.experts[rows].astype(np.int64)
    weights = request.weights[rows].astype(np.float32)
    for observed in range(layers):
        for slot, distance in enumerate(distances):
            for layer in _targets(observed, distance, layers):
                kept[:, slot, layer] = step.predict(layer)
        if accuracy is not None:
            for distance in accuracy.distances:
                for layer in _targets(observed, distance, layers):
                    accuracy.note(distance, layer, step.predict(layer), experts[:, layer])
        step.observe(observed, experts[:, observed], weights[:, observed])


def _targets(observed: int, distance: int, layers: int) -> range:
    """Layers to predict when those before ``observed`` have been seen; distance 0 means from the step's start."""
    if observed == 0:
        return range(layers if distance == 0 else min(distance, layers))
    return range(observed + distance - 1, min(observed + distance, layers)) if distance else range(0)
