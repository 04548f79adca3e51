"""Training samples for the heads, drawn from a trace: the same inputs a running step would have seen."""

import numpy as np
from numpy.typing import NDArray

from ..history.trace import PREFILL, Trace
from .context import FREQUENCY_HALF_LIFE, UNKNOWN_TOKEN
from .network import Array, encode_context, encode_maps

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
