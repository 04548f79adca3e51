"""The heads as a predictor: a trained network stepped along a token's trajectory.

It runs between the layers of a forward pass, so it reads no weight it does not need: a map has few experts, so inputs
made of maps are sums over their rows of the weights; what a token alone contributes is kept for its next time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .base import Experts, ModelShape, Predictor, Probabilities, Step, TokenContext, TokenMap, Weights
from .network import Array, Parameters
from .token_vectors import TokenVectors

_KEPT_TOKENS = 4096
"""Tokens whose share of the state is kept: both as the current and as the previous one."""
_AT_ONCE = 512
"""Tokens whose vectors are in memory together while their share of the state is worked out."""


class HeadsPredictor(Predictor):
    """Probabilities from ``Parameters`` that ``HeadsTrainer`` has trained, which must not change any more."""

    def __init__(self, shape: ModelShape, parameters: Parameters, vectors: TokenVectors):
        super().__init__(shape)
        self.vectors = vectors
        self.weights = HeadWeights(parameters)
        self._token_states: dict[int, Array] = {}
        layers, _, top_k = shape
        self._no_map = TokenMap(np.full((layers, top_k), -1), np.zeros((layers, top_k), np.float32))

    def begin(self, rows: Sequence[TokenContext]) -> "HeadsStep":
        return HeadsStep(self.weights, self._state_of(rows), self.known_before(rows))

    def before_step(self, rows: Sequence[TokenContext]) -> tuple[Array, Array]:
        """What a step over ``rows`` begins with: ``[B, state]`` before its first layer, and ``[L, B, hidden]``, what is
        known before the step as far as the hidden units of each layer."""
        known, weights = self.known_before(rows), self.weights
        return self._state_of(rows), np.stack([weights.hidden_before(at, known) for at in range(self.shape.layers)])

    def known_before(self, rows: Sequence[TokenContext]) -> "KnownBefore":
        """What the heads know of ``rows`` before the step."""
        return KnownBefore(
            *_stacked([row.previous or self._no_map for row in rows]),
            *_stacked([row.same or self._no_map for row in rows]),
            np.array([row.frequency for row in rows]),
        )

    def _state_of(self, rows: Sequence[TokenContext]) -> Array:
        self._know([token for row in rows for token in (row.token, row.previous_token)])
        known = self._token_states
        return np.array([known[row.token][0] + known[row.previous_token][1] for row in rows])

    def _know(self, tokens: list[int]) -> None:
        new = list({token for token in tokens if token not in self._token_states})
        if not new:
            return
        if len(self._token_states) + len(new) > _KEPT_TOKENS:
            self._token_states.clear()
            new = list(set(tokens))
        for first in range(0, len(new), _AT_ONCE):
            part = new[first : first + _AT_ONCE]
            states = self.vectors.look_up(np.array(part)) @ self.weights.tokens
            self._token_states.update(zip(part, states.reshape(len(part), 2, -1), strict=True))


class KnownBefore(NamedTuple):
    """Arguments of ``kernels.add_context``: maps ``[B, L, K]``, and the requests' frequencies ``[B, L, E]``."""

    previous: NDArray[np.int64]
    previous_weights: Array
    same: NDArray[np.int64]
    same_weights: Array
    frequency: Array


class HeadWeights:
    """``Parameters`` laid out for stepping: what is read together lies together.

    For each expert, the row that counts its presence is followed by the one that counts its weight.
    """

    def __init__(self, parameters: Parameters):
        layers, experts, vector, state, hidden = parameters.size
        views = parameters.views
        self.tokens = np.concatenate([views["P"][:vector], views["P"][vector:]], axis=1)
        self.maps = list(_by_expert(views["U"].reshape(layers, 2, experts, state)))
        self.contexts = list(_by_expert(views["C"][:, : 8 * experts].reshape(layers, 4, 2, experts, hidden)))
        self.frequency = list(4 * views["C"][:, 8 * experts :])
        self.hidden_bias = views["b"]
        self.heads = list(_transposed(views["A"]))
        self.outputs = list(_transposed(views["O"]))
        self.output_bias = list(views["c"][:, 0])

    def hidden_before(self, layer: int, known: KnownBefore) -> Array:
        """``[B, hidden]``: what is ``known`` before the step, as far as the hidden units of ``layer``."""
        hidden = np.repeat(self.hidden_bias[layer], len(known.frequency), axis=0)
        kernels.add_context(layer, *known, self.contexts[layer], self.frequency[layer], hidden)
        return hidden


class HeadsStep(Step):
    """The running state ``[B, state]`` of every row."""

    def __init__(self, weights: HeadWeights, state: Array, known: KnownBefore):
        self._weights = weights
        self._state = state
        self._known = known
        self._hidden: dict[int, Array] = {}
        """Of the layers predicted so far."""

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        kernels.add_map(*kernels.as_map(experts, weights), self._weights.maps[layer], self._state)

    def predict(self, layer: int) -> Probabilities:
        weights = self._weights
        if layer not in self._hidden:
            self._hidden[layer] = weights.hidden_before(layer, self._known)
        bias = weights.output_bias[layer]
        probabilities = np.empty((len(self._state), len(bias)), np.float32)
        kernels.evaluate_head(
            self._state, self._hidden[layer], weights.heads[layer], weights.outputs[layer], bias, probabilities
        )
        return probabilities


def _stacked(maps: Sequence[TokenMap]) -> tuple[NDArray[np.int64], Array]:
    experts, weights = zip(*maps, strict=True)
    return np.array(experts, np.int64), np.array(weights, np.float32)


def _transposed(matrices: Array) -> Array:
    return np.ascontiguousarray(matrices.transpose(0, 2, 1))


def _by_expert(halves: Array) -> Array:
    """``[..., 2, E, n]`` as contiguous ``[..., E, 2 * n]``."""
    swapped = np.ascontiguousarray(np.swapaxes(halves, -3, -2))
    return swapped.reshape(*swapped.shape[:-2], -1)
