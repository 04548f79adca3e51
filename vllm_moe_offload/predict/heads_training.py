"""Training the heads in small steps, so that whoever trains can pause between them and stop at any moment."""

import numpy as np

from ..history.trace import Trace
from .context import UNKNOWN_TOKEN
from .network import NetworkInput, Parameters, forward_backward
from .optimiser import Adam
from .samples import Samples
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
