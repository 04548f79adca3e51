"""The heads as a predictor: a trained network stepped along a token's trajectory.

It runs between the layers of a forward pass, so it reads no weight it does not need: a map has few experts, so inputs
made of maps are sums over their rows of the weights; what a token alone contributes is kept for its next time.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import TokenContext, TokenMap
from .network import Array, Parameters, sigmoid
from .token_vectors import TokenVectors

_KEPT_TOKENS = 4096
"""Tokens whose share of the state is kept: both as the current and as the previous one."""


class HeadsPredictor(Predictor):
    """Probabilities from ``Parameters`` that ``HeadsTrainer`` has trained, which must not change any more."""

    def __init__(self, shape: ModelShape, parameters: Parameters, vectors: TokenVectors):
        super().__init__(shape)
        self.vectors = vectors
        self.weights = HeadWeights(parameters)
        self._token_states: dict[int, Array] = {}

    def begin(self, rows: Sequence[TokenContext]) -> "HeadsStep":
        self._know([token for row in rows for token in (row.token, row.previous_token)])
        known = self._token_states
        state = np.array([known[row.token][0] + known[row.previous_token][1] for row in rows])
        return HeadsStep(self.weights, state, self.hidden_from_context(rows))

    def hidden_from_context(self, rows: Sequence[TokenContext]) -> Array:
        """What is known before the step, as far as every head's hidden units: ``[L, B, hidden]``."""
        frequency = np.array([row.frequency for row in rows]).transpose(1, 0, 2)
        hidden = np.matmul(frequency, self.weights.frequency)
        hidden += self.weights.hidden_bias
        for row, context in enumerate(rows):
            if context.previous is not None:
                self._add_previous(hidden[:, row], context.previous)
            if context.same is not None:
                hidden[:, row] += self.weights.of_maps(3, slice(None), context.same)
        return hidden

    def _add_previous(self, hidden: Array, previous: TokenMap) -> None:
        """A head reads the previous token's map at its own layer and at those beside it."""
        experts, weights = previous
        hidden[1:] += self.weights.of_maps(0, slice(1, None), TokenMap(experts[:-1], weights[:-1]))
        hidden += self.weights.of_maps(1, slice(None), previous)
        hidden[:-1] += self.weights.of_maps(2, slice(None, -1), TokenMap(experts[1:], weights[1:]))

    def _know(self, tokens: list[int]) -> None:
        new = list({token for token in tokens if token not in self._token_states})
        if not new:
            return
        if len(self._token_states) + len(new) > _KEPT_TOKENS:
            self._token_states.clear()
            new = list(set(tokens))
        states = self.vectors.look_up(np.array(new)) @ self.weights.tokens
        self._token_states.update(zip(new, states.reshape(len(new), 2, -1), strict=True))


class HeadWeights:
    """``Parameters`` laid out for stepping: what is read together lies together.

    For each expert, the row that counts its presence is followed by the one that counts its weight.
    """

    def __init__(self, parameters: Parameters):
        layers, experts, vector, state, hidden = parameters.size
        views = parameters.views
        self.tokens = np.concatenate([views["P"][:vector], views["P"][vector:]], axis=1)
        self.maps = list(_by_expert(views["U"].reshape(layers, 2, experts, state)))
        contexts = views["C"][:, : 8 * experts].reshape(layers, 4, 2, experts, hidden)
        self._contexts = [_by_expert(contexts[:, place]).reshape(layers * experts, -1) for place in range(4)]
        self._first = np.arange(0, layers * experts, experts)[:, None]
        self.frequency = 4 * views["C"][:, 8 * experts :]
        self.hidden_bias = views["b"]
        # a few rows times a matrix is twice as fast from this side
        self.heads = list(_transposed(views["A"]))
        self.outputs = list(_transposed(views["O"]))
        self.output_bias = list(_transposed(views["c"]))

    def of_maps(self, place: int, layers: slice, maps: TokenMap) -> Array:
        """``[l, hidden]``: what ``maps`` ``[l, K]`` contribute to the heads of ``layers`` as their ``place``-th map."""
        rows = self._contexts[place].take(maps.experts + self._first[layers], axis=0)
        count, top_k, _ = rows.shape
        return np.matmul(_scale(maps.weights), rows.reshape(count, 2 * top_k, -1))[:, 0]


class HeadsStep(Step):
    """The running state ``[B, state]`` of every row."""

    def __init__(self, weights: HeadWeights, state: Array, hidden_from_context: Array):
        self._weights = weights
        self._state = state
        self._hidden_from_context = np.ascontiguousarray(hidden_from_context.transpose(0, 2, 1))
        self._hidden = np.empty(self._hidden_from_context.shape[1:], np.float32)

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        rows = self._weights.maps[layer].take(experts, axis=0)
        count, top_k = experts.shape
        added = np.matmul(_scale(weights), rows.reshape(count, 2 * top_k, -1))
        self._state += added[:, 0]

    def predict(self, layer: int) -> Probabilities:
        weights = self._weights
        hidden = np.dot(weights.heads[layer], self._state.T, out=self._hidden)
        hidden += self._hidden_from_context[layer]
        np.maximum(hidden, 0, out=hidden)
        outputs = np.dot(weights.outputs[layer], hidden)
        outputs += weights.output_bias[layer]
        return sigmoid(outputs).T


def _transposed(matrices: Array) -> Array:
    return np.ascontiguousarray(matrices.transpose(0, 2, 1))


def _by_expert(halves: Array) -> Array:
    """``[..., 2, E, n]`` as contiguous ``[..., E, 2 * n]``."""
    swapped = np.ascontiguousarray(np.swapaxes(halves, -3, -2))
    return swapped.reshape(*swapped.shape[:-2], -1)


def _scale(weights: NDArray[np.floating]) -> Array:
    """``[n, 1, 2K]`` from routing weights ``[n, K]``: for each expert one for its presence, then its weight times K."""
    count, top_k = weights.shape
    scale = np.ones((count, 1, 2 * top_k), np.float32)
    np.multiply(weights, top_k, out=scale[:, 0, 1::2], casting="same_kind")
    return scale
