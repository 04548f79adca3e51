"""The contract of a predictor, and the words it is written in.

A predictor sees each forward pass as a **step** over rows; a row is one token of one request. It never sees what is
resident or how fast loads are: those belong to the planner.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import UNKNOWN_TOKEN, Trace

FREQUENCY_HALF_LIFE = 16.0
"""Tokens after which a use counts half in ``RequestState.frequency``."""
_DECAY = np.float32(0.5 ** (1 / FREQUENCY_HALF_LIFE))
_MOST_NEWS = 64


class TokenMap(NamedTuple):
    """The expert map of one token: ``experts`` int ``[L, K]`` and ``weights`` float ``[L, K]``.

    Of any int and float type; thousands are kept, so small types save memory.
    """

    experts: NDArray[np.integer]
    weights: NDArray[np.floating]


class TokenContext(NamedTuple):
    """One row of a step, as its request stood when the step began."""

    state: "RequestState"
    token: int
    """The token the forward pass reads, or UNKNOWN_TOKEN."""
    previous_token: int
    previous: TokenMap | None
    """Map of the request's previous token; None at its start and for tokens that run side by side in prefill."""
    same: TokenMap | None
    """Latest map of the same token, in this request or any other."""
    frequency: NDArray[np.float32]
    """``[L, E]``: decayed share of the request's tokens that used each expert."""


class TokenMemory:
    """The latest map of each token, for the ``capacity`` tokens seen last. Shared by all requests."""

    def __init__(self, capacity: int = 16384):
        self.capacity = capacity
        self._maps: OrderedDict[int, TokenMap] = OrderedDict()

    def recall(self, token: int) -> TokenMap | None:
        return self._maps.get(token)

    def remember(self, token: int, token_map: TokenMap) -> None:
        """Replace the map of ``token``. UNKNOWN_TOKEN is not remembered."""
        if token == UNKNOWN_TOKEN:
            return
        self._maps[token] = token_map
        self._maps.move_to_end(token)
        if len(self._maps) > self.capacity:
            self._maps.popitem(last=False)


class RequestState:
    """One running request's past, as far as predictors read it."""

    def __init__(self, shape: tuple[int, int, int], embedding: NDArray[np.floating] | None, memory: TokenMemory):
        layers, experts, _ = shape
        self.embedding = embedding
        self.predictor_state: object = None
        """Whatever the predictor that started this request keeps about it."""
        self._memory = memory
        self._previous: TokenMap | None = None
        self._previous_token = UNKNOWN_TOKEN
        self._decayed = np.zeros((layers, experts), np.float32)
        self._news: list[TokenMap] = []
        """Maps of tokens that ``_decayed`` does not know of yet."""
        self._first = np.arange(0, layers * experts, experts)[:, None]

    def context(self, token: int = UNKNOWN_TOKEN) -> TokenContext:
        """The row for a forward pass that reads ``token`` next."""
        same = self._memory.recall(token)
        return TokenContext(self, token, self._previous_token, self._previous, same, self._frequency())

    def contexts_side_by_side(self, tokens: NDArray[np.integer]) -> list[TokenContext]:
        """Rows for tokens of a prefill chunk: none has the map of the one before it."""
        before = [self._previous_token, *tokens[:-1].tolist()]
        recall, frequency = self._memory.recall, self._frequency()
        return [
            TokenContext(self, token, previous, None, recall(token), frequency)
            for token, previous in zip(tokens.tolist(), before, strict=True)
        ]

    def advance(self, token: int, token_map: TokenMap) -> None:
        """``token`` has run and was routed as in ``token_map``. Contexts taken before stay as they were."""
        self._news.append(token_map)
        if len(self._news) == _MOST_NEWS:
            self._frequency()
        self._previous = token_map
        self._previous_token = token
        self._memory.remember(token, token_map)

    def _frequency(self) -> NDArray[np.float32]:
        """``TokenContext.frequency`` now. Computed on demand: steps that are not predicted never need it."""
        if self._news:
            places = np.stack([news.experts for news in self._news]) + self._first
            shares = (1 - _DECAY) * _DECAY ** np.arange(len(places) - 1, -1, -1, dtype=np.float32)
            added = np.bincount(places.ravel(), np.repeat(shares, places[0].size), self._decayed.size)
            decayed = self._decayed * _DECAY ** len(places)
            self._decayed = decayed + added.astype(np.float32).reshape(decayed.shape)
            self._news = []
        return self._decayed


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
        """A request arrives. ``embedding``: the prompt's ``[D]``, at unit length, if known.

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
