"""Training the heads in small steps, so that a caller can pause between them and stop at any moment."""

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import PREFILL, Trace
from .base import FREQUENCY_HALF_LIFE, UNKNOWN_TOKEN
from .network import Adam, Array, NetworkInput, Parameters, encode_context, encode_maps, forward_backward
from .token_vectors import LearnedVectors, TokenVectors

_BATCH = 256
_EPOCHS = 3.0
_MIN_STEPS = 150
"""A young history is passed over more often, so that the heads take at least so many steps."""
_PEAK_RATE = 3e-3
_WARM_UP = 30
_FORGET = 0.1
"""Share of rows whose token, previous token or previous map is hidden, so that the heads can do without."""
_DISTANCES = (2, 1, 2, 3, 1, 0, 2, 1)
"""Distances trained in turn."""
_WINDOW = int(3 * FREQUENCY_HALF_LIFE)
"""Tokens back over which the request's frequency is summed; what lies further back has decayed to an eighth."""


class Samples:
    """Row numbers of a trace in, arrays of the network's inputs out."""

    def __init__(self, trace: Trace):
        self.trace = trace
        rows = np.arange(trace.num_tokens)
        self._start = np.repeat(trace.offsets[:-1], np.diff(trace.offsets))
        self._previous = np.where(rows > self._start, rows - 1, -1)
        self.tokens = (
            np.full(trace.num_tokens, UNKNOWN_TOKEN) if trace.tokens is None else trace.tokens.astype(np.int64)
        )
        self.previous_tokens = np.where(self._previous >= 0, self.tokens[self._previous], UNKNOWN_TOKEN)
        self._side_by_side = np.zeros(len(rows), bool) if trace.phase is None else trace.phase == PREFILL
        self._same = _latest_row_of_same_token(self.tokens)

    def __len__(self) -> int:
        return self.trace.num_tokens

    def maps(self, rows: NDArray[np.integer]) -> Array:
        """Encoded maps ``[L, B, 2E]``; all zero for row -1."""
        weights = self.trace.weights[rows].astype(np.float32)
        weights[rows < 0] = 0
        return encode_maps(self.trace.experts[rows], weights, self.trace.num_experts)

    def context(self, rows: NDArray[np.integer], forget: NDArray[np.bool_]) -> Array:
        """Inputs known before the step, ``[L, B, context]``; rows to ``forget``, and of prefill, have no map before."""
        previous = np.where(forget | self._side_by_side[rows], -1, self._previous[rows])
        return encode_context(self.maps(previous), self.maps(self._same[rows]), self._frequency(rows))

    def _frequency(self, rows: NDArray[np.integer]) -> Array:
        trace = self.trace
        layers, experts = trace.num_layers, trace.num_experts
        lags = np.arange(1, _WINDOW + 1)
        past = rows[:, None] - lags
        row, lag = np.nonzero(past >= self._start[rows][:, None])
        share = (1 - 0.5 ** (1 / FREQUENCY_HALF_LIFE)) * 0.5 ** (lag / FREQUENCY_HALF_LIFE)
        chosen = trace.experts[past[row, lag]]
        index = ((np.arange(layers) * len(rows) + row[:, None]) * experts)[:, :, None] + chosen
        shares = np.broadcast_to(share[:, None, None], index.shape)
        sums = np.bincount(index.ravel(), shares.ravel(), minlength=layers * len(rows) * experts)
        return sums.astype(np.float32).reshape(layers, len(rows), experts)


def _latest_row_of_same_token(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the last earlier row with the same token, -1 where there is none or the token is unknown."""
    order = np.argsort(tokens, kind="stable")
    same = np.full(len(tokens), -1)
    repeats = (tokens[order][1:] == tokens[order][:-1]) & (tokens[order][1:] != UNKNOWN_TOKEN)
    same[order[1:][repeats]] = order[:-1][repeats]
    return same


class HeadsTrainer:
    """One run of training over a fixed trace: some passes, the learning rate falling to nearly zero at the end."""

    def __init__(
        self, parameters: Parameters, vectors: TokenVectors, trace: Trace, num_steps: int | None = None, seed: int = 0
    ):
        self.parameters = parameters
        self.vectors = vectors
        self._samples = Samples(trace)
        if isinstance(vectors, LearnedVectors):
            vectors.grow(self._samples.tokens)
        self._rng = np.random.default_rng(seed)
        self._adam = Adam(len(parameters.flat))
        self._gradient = Parameters(parameters.size)
        self._queue = np.empty(0, np.int64)
        self._step = 0
        self.num_steps = _usual_steps(trace.num_tokens) if num_steps is None else num_steps

    @property
    def finished(self) -> bool:
        return self._step >= self.num_steps

    def step(self) -> None:
        """Learn from one batch."""
        rows = self._next_rows()
        samples = self._samples
        hidden = self._rng.random((3, len(rows))) < _FORGET
        tokens = np.where(hidden[0], UNKNOWN_TOKEN, samples.tokens[rows])
        previous = np.where(hidden[1], UNKNOWN_TOKEN, samples.previous_tokens[rows])
        both = np.concatenate([tokens, previous])
        width = self.vectors.width
        vectors = (
            self.vectors.look_up(both).reshape(2, len(rows), width).transpose(1, 0, 2).reshape(len(rows), 2 * width)
        )
        inputs = NetworkInput(vectors, samples.context(rows, hidden[2]), samples.maps(rows))
        distance = _DISTANCES[self._step % len(_DISTANCES)]
        _, slope = forward_backward(self.parameters, inputs, distance, self._gradient)
        rate = self._rate()
        self._adam.update(self.parameters.flat, self._gradient.flat, rate)
        self.vectors.learn(both, slope.reshape(len(rows), 2, width).transpose(1, 0, 2).reshape(-1, width), rate)
        self._step += 1

    def _rate(self) -> float:
        warm = min(1.0, (self._step + 1) / _WARM_UP)
        return float(_PEAK_RATE * warm * (0.02 + 0.49 * (1 + np.cos(np.pi * self._step / self.num_steps))))

    def _next_rows(self) -> np.ndarray:
        if len(self._queue) == 0:
            self._queue = self._rng.permutation(len(self._samples))
        rows, self._queue = self._queue[:_BATCH], self._queue[_BATCH:]
        return rows


def _usual_steps(tokens: int) -> int:
    return max(_MIN_STEPS, round(_EPOCHS * tokens / _BATCH)) if tokens else 0
