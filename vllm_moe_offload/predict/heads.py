"""The heads as a predictor: a trained network stepped along a token's trajectory."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Experts, ModelShape, Predictor, Probabilities, Step, Weights
from .context import TokenContext, TokenMap
from .network import Array, Parameters, encode_context, encode_maps, sigmoid
from .token_vectors import TokenVectors


class HeadsPredictor(Predictor):
    """Probabilities from ``Parameters`` that ``HeadsTrainer`` has trained."""

    def __init__(self, shape: ModelShape, parameters: Parameters, vectors: TokenVectors):
        super().__init__(shape)
        self.parameters = parameters
        self.vectors = vectors

    def begin(self, rows: Sequence[TokenContext]) -> "HeadsStep":
        return HeadsStep(self.parameters, self._vectors(rows), _encode(rows, self.shape))

    def _vectors(self, rows: Sequence[TokenContext]) -> Array:
        current = self.vectors.look_up(np.array([row.token for row in rows]))
        previous = self.vectors.look_up(np.array([row.previous_token for row in rows]))
        return np.concatenate([current, previous], axis=1)


class HeadsStep(Step):
    """The running state ``[B, state]`` of every row."""

    def __init__(self, parameters: Parameters, vectors: Array, context: Array):
        views = parameters.views
        self._maps, self._heads = views["U"], views["A"]
        self._outputs, self._output_bias = views["O"], views["c"]
        self._experts = parameters.size.experts
        self._state = vectors @ views["P"]
        self._hidden_from_context = context @ views["C"]
        self._hidden_from_context += views["b"]

    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        top_k = experts.shape[1]
        chosen = np.concatenate([experts, experts + self._experts], axis=1)
        scale = np.ones((len(experts), 1, 2 * top_k), np.float32)
        scale[:, 0, top_k:] = weights * np.float32(top_k)
        self._state += np.matmul(scale, self._maps[layer][chosen])[:, 0]

    def predict(self, layer: int) -> Probabilities:
        hidden = self._state @ self._heads[layer]
        hidden += self._hidden_from_context[layer]
        np.maximum(hidden, 0, out=hidden)
        outputs = hidden @ self._outputs[layer]
        outputs += self._output_bias[layer]
        return sigmoid(outputs)


def _encode(rows: Sequence[TokenContext], shape: ModelShape) -> Array:
    previous = _encode_maps([row.previous for row in rows], shape)
    same = _encode_maps([row.same for row in rows], shape)
    frequency = np.stack([row.frequency for row in rows], axis=1)
    return encode_context(previous, same, frequency)


def _encode_maps(maps: list[TokenMap | None], shape: ModelShape) -> Array:
    experts = np.zeros((len(maps), shape.layers, shape.top_k), np.int64)
    weights: NDArray[np.float32] = np.zeros(experts.shape, np.float32)
    for row, token_map in enumerate(maps):
        if token_map is not None:
            experts[row], weights[row] = token_map
    return encode_maps(experts, weights, shape.experts)
