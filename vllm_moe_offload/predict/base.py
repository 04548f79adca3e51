"""The contract of a predictor, and the words it is written in.

A predictor sees each forward pass as a **step** over rows; a row is one token of one request. It never knows what is
resident or how fast loads are: those are the planner's concern.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..history.trace import Trace
from .context import RequestState, TokenContext, TokenMap, TokenMemory

Experts = NDArray[np.integer]
Weights = NDArray[np.floating]
Probabilities = NDArray[np.float32]


class ModelShape(NamedTuple):
    """What a predictor must know of the model. Same order as ``Trace.shape``."""

    layers: int
    experts: int
    top_k: int


class Step(ABC):
    """One forward pass over ``B`` rows, layer after layer."""

    @abstractmethod
    def observe(self, layer: int, experts: Experts, weights: Weights) -> None:
        """The rows were routed at ``layer``. Layers come in rising order, each once.

        Args:
            experts: ``[B, K]`` expert numbers within the layer.
            weights: ``[B, K]`` routing weights, summing to 1 per row.
        """

    @abstractmethod
    def predict(self, layer: int) -> Probabilities:
        """Probability that each row will use each expert of ``layer``, given what has been observed so far.

        ``layer`` lies after the last one observed. Returns float32 ``[B, E]``, a new array.
        """


class Predictor(ABC):
    """Turns what has been seen into probabilities for the layers ahead.

    One that is to be found by its name (``registry``), or from outside by ``package.module:Class``, is made as
    ``Class(shape)`` and then fitted to what earlier requests were routed to. Of its methods only ``start_request``,
    ``fit`` and ``end_request`` may take milliseconds. One that raises is switched off for good; the engine serves on.
    """

    learns_from_each_token = False
    """Whether ``learn`` changes what is predicted for the same request's next tokens."""

    def __init__(self, shape: ModelShape):
        self.shape = shape
        self.memory = TokenMemory()

    def fit(self, trace: Trace) -> None:  # noqa: B027 - some predictors learn nothing from the past
        """Learn from the requests of ``trace``, oldest first, before the first step. May be called several times."""

    def start_request(self, embedding: NDArray[np.floating] | None = None) -> RequestState:
        """A request arrives. ``embedding``: unit vector of its meaning ``[D]``, if known.

        May take milliseconds; never call it between the layers of a step.
        """
        return RequestState(self.shape, embedding, self.memory)

    @abstractmethod
    def begin(self, rows: Sequence[TokenContext]) -> Step:
        """A forward pass over these rows starts. ``rows`` come from ``RequestState.context``, one per token."""

    def learn(self, state: RequestState, token: int, token_map: TokenMap) -> None:  # noqa: B027 - most learn elsewhere
        """A ``token`` of a request has run through all layers, and ``state`` has advanced past it."""

    def end_request(self, state: RequestState, trace: Trace) -> None:  # noqa: B027 - most predictors learn elsewhere
        """A request ended; ``trace`` holds its tokens' maps. Predictors with a store of their own remember it here."""


def union_probability(probabilities: Probabilities) -> Probabilities:
    """Probability ``[..., E]`` that any row uses each expert: ``1 - prod(1 - p)`` over the first axis."""
    if len(probabilities) == 1:
        return probabilities[0]
    return 1 - np.prod(1 - probabilities, axis=0)
