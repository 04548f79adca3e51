"""The network behind the learned heads: arithmetic only, forward, backward and optimiser, in numpy.

A token's state is a running sum: a projection of its own and the previous token's vector, plus one learned row per
expert it was routed to so far. Each layer has a small head that reads the state and what was known before the step (the
previous token's map around that layer, the same token's last map, the request's frequencies):

    hidden = relu(state @ A + context @ C + b)      p = sigmoid(hidden @ O + c)

One state serves every distance; the sum itself shows how many layers are in it. Training follows binary
cross-entropy, so the outputs are probabilities as they come.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 15
"""Parameters updated at a time: so many stay in the processor's cache."""
Array = NDArray[np.float32]


class NetworkSize(NamedTuple):
    """Dimensions, as the saved file states them."""

    layers: int
    experts: int
    vector: int
    """Length of a token's vector."""
    state: int = 256
    hidden: int = 192

    @property
    def context(self) -> int:
        """Inputs of a head known before the step: previous map at three layers, same-token map, frequency."""
        return 9 * self.experts

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        layers, experts, vector, state, hidden = self
        return {
            "P": (2 * vector, state),
            "U": (layers, 2 * experts, state),
            "A": (layers, state, hidden),
            "C": (layers, self.context, hidden),
            "b": (layers, 1, hidden),
            "O": (layers, hidden, experts),
            "c": (layers, 1, experts),
        }


class NetworkInput(NamedTuple):
    """``B`` rows. ``maps`` is needed for training only; a running step adds to the state as layers are observed."""

    vectors: Array
    """``[B, 2 * vector]``: the token's vector and the previous token's, zero where unknown."""
    context: Array
    """``[L, B, context]``."""
    maps: Array
    """``[L, B, 2 * experts]``: the token's own map, as ``encode_maps`` gives it."""


class Parameters:
    """All parameters in one flat buffer, so that an optimiser sees one vector; ``views`` names the parts."""

    def __init__(self, size: NetworkSize, flat: Array | None = None):
        self.size = size
        shapes = size.parameter_shapes()
        total = sum(int(np.prod(shape)) for shape in shapes.values())
        self.flat = np.zeros(total, np.float32) if flat is None else flat
        if self.flat.shape != (total,):
            raise ValueError(f"{size} has {total} parameters, got {self.flat.shape}")
        self.views: dict[str, Array] = {}
        start = 0
        for name, shape in shapes.items():
            stop = start + int(np.prod(shape))
            self.views[name] = self.flat[start:stop].reshape(shape)
            start = stop

    @classmethod
    def random(cls, size: NetworkSize, rng: np.random.Generator) -> "Parameters":
        """Freshly initialised parameters."""
        self = cls(size)
        scales = {
            "P": size.vector**-0.5,
            "U": 0.1,
            "A": size.state**-0.5,
            "C": 0.05,
            "O": size.hidden**-0.5,
        }
        for name, scale in scales.items():
            view = self.views[name]
            view[...] = rng.standard_normal(view.shape, np.float32) * np.float32(scale)
        self.views["c"][...] = -2.0
        return self


def encode_maps(experts: NDArray[np.integer], weights: NDArray[np.floating], num_experts: int) -> Array:
    """Maps ``[B, L, K]`` as dense float32 ``[L, B, 2 * num_experts]``: one for each chosen expert, then its weight.

    Weights are scaled by K so that both halves are of one magnitude. A row of zero weights (no map) stays zero.
    """
    rows, layers, top_k = experts.shape
    dense = np.zeros((layers, rows, 2 * num_experts), np.float32)
    base = (np.arange(layers) * rows)[None, :, None] + np.arange(rows)[:, None, None]
    index = base * (2 * num_experts) + experts
    flat = dense.reshape(-1)
    flat[index] = np.any(weights, axis=(1, 2), keepdims=True)
    flat[index + num_experts] = weights * top_k
    return dense


def encode_context(previous: Array, same: Array, frequency: Array) -> Array:
    """``[L, B, context]`` from encoded maps of the previous and the same token, and frequencies ``[L, B, E]``."""
    layers, rows, width = previous.shape
    context = np.zeros((layers, rows, 4 * width + frequency.shape[2]), np.float32)
    context[1:, :, :width] = previous[:-1]
    context[:, :, width : 2 * width] = previous
    context[:-1, :, 2 * width : 3 * width] = previous[1:]
    context[:, :, 3 * width : 4 * width] = same
    context[:, :, 4 * width :] = frequency * 4
    return context


def sigmoid(values: Array) -> Array:
    """Logistic function, in place."""
    values *= 0.5
    np.tanh(values, out=values)  # never overflows, unlike exp
    values *= 0.5
    values += 0.5
    return values


def known_layers(layers: int, distance: int) -> NDArray[np.int64]:
    """How many layers a prediction ``distance`` ahead has seen, for each target layer; 0 distance: none at all."""
    if distance == 0:
        return np.zeros(layers, np.int64)
    return np.maximum(np.arange(layers) - distance + 1, 0)


def forward_backward(
    parameters: Parameters, inputs: NetworkInput, distance: int, gradient: Parameters
) -> tuple[float, Array]:
    """Fill ``gradient`` with that of the binary cross-entropy, summed over outputs and averaged over rows.

    Returns the mean cross-entropy per output, and the gradient of the vectors, ``[B, 2 * vector]``.
    """
    p, g = parameters.views, gradient.views
    targets = inputs.maps[:, :, : parameters.size.experts]
    layers, rows, _ = targets.shape
    known = known_layers(layers, distance)
    states = np.empty((layers + 1, rows, parameters.size.state), np.float32)
    states[0] = inputs.vectors @ p["P"]
    np.matmul(inputs.maps, p["U"], out=states[1:])
    for layer in range(layers):  # np.cumsum over the first axis is many times slower
        states[layer + 1] += states[layer]

    seen = states[known]
    hidden = seen @ p["A"]
    hidden += inputs.context @ p["C"]
    hidden += p["b"]
    np.maximum(hidden, 0, out=hidden)
    outputs = sigmoid(hidden @ p["O"] + p["c"])
    loss = -float(np.log(np.where(targets > 0, outputs, 1 - outputs) + 1e-12).mean())

    delta = (outputs - targets) / np.float32(rows)
    np.matmul(hidden.transpose(0, 2, 1), delta, out=g["O"])
    np.sum(delta, axis=1, keepdims=True, out=g["c"])
    delta_hidden = delta @ p["O"].transpose(0, 2, 1)
    delta_hidden *= hidden > 0
    np.sum(delta_hidden, axis=1, keepdims=True, out=g["b"])
    np.matmul(seen.transpose(0, 2, 1), delta_hidden, out=g["A"])
    np.matmul(inputs.context.transpose(0, 2, 1), delta_hidden, out=g["C"])
    delta_seen = delta_hidden @ p["A"].transpose(0, 2, 1)

    delta_states = np.zeros_like(states)
    for layer, index in enumerate(known):
        delta_states[index] += delta_seen[layer]
    for layer in reversed(range(layers)):
        delta_states[layer] += delta_states[layer + 1]
    np.matmul(inputs.maps.transpose(0, 2, 1), delta_states[1:], out=g["U"])
    np.matmul(inputs.vectors.T, delta_states[0], out=g["P"])
    return loss, delta_states[0] @ p["P"].T


class Adam:
    """Adam (Kingma and Ba, 2015): first and second moments of the gradient of ``size`` parameters."""

    def __init__(self, size: int, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8):
        self._mean = np.zeros(size, np.float32)
        self._square = np.zeros(size, np.float32)
        self._beta1, self._beta2, self._epsilon = np.float32(beta1), np.float32(beta2), np.float32(epsilon)
        self._steps = 0

    def update(self, parameters: NDArray[np.float32], gradient: NDArray[np.float32], rate: float) -> None:
        """Move ``parameters`` one step against ``gradient``, in place."""
        self._steps += 1
        beta1, beta2 = self._beta1, self._beta2
        correction = np.sqrt(1 - float(beta2) ** self._steps)
        step = np.float32(rate * correction / (1 - float(beta1) ** self._steps))
        epsilon = np.float32(self._epsilon * correction)
        for start in range(0, len(parameters), _BLOCK):
            block = slice(start, start + _BLOCK)
            slope, mean, square = gradient[block], self._mean[block], self._square[block]
            mean *= beta1
            mean += (1 - beta1) * slope
            square *= beta2
            square += (1 - beta2) * slope * slope
            parameters[block] -= step * mean / (np.sqrt(square) + epsilon)
