"""Puts together what the layers of each step route to, token by token, until a request ends and is a trace.

Pure bookkeeping: it must never depend on what is resident, and never keep an array that belongs to the engine.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .trace import DECODE, PREFILL, Trace, sound_tokens

_NEVER_ZERO = np.float32(1e-9)


def routing_shares(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Routing weights ``[..., K]`` as a trace holds them, whatever the router's scale: 1 together, or all zero.

    Weights that are not finite, or negative, make shares that are neither.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        totals = np.add.reduce(weights, axis=-1, keepdims=True)
        shares: NDArray[np.float32] = weights / np.maximum(totals, _NEVER_ZERO)
    return shares


class ScheduledTokens(NamedTuple):
    """The rows of one request in a step: consecutive tokens, in the order in which the forward pass reads them."""

    request: str
    position: int
    """Of the first of them within the request."""
    tokens: NDArray[np.int32]
    prompt: int
    """Tokens of the request that were given rather than generated."""
    drafts: int = 0
    """How many of the last rows are drafted tokens, which may come to nothing."""

    @property
    def is_prefill(self) -> bool:
        return self.position < self.prompt


class RequestMaps(NamedTuple):
    """What the rows of one request were routed to: ``experts`` and ``weights`` are ``[tokens, L, K]``, and sound.

    Only tokens that had not been seen before: a request that was preempted runs again over what it has been through.
    """

    rows: ScheduledTokens
    tokens: NDArray[np.int32]
    experts: NDArray[np.unsignedinteger]
    weights: NDArray[np.float16]


class Recorder:
    """The maps of running requests.

    A token whose routing no trace can hold (weights that are NaN, negative or all zero, an expert that is none or named
    twice) is left out and counted: whatever is recorded can be saved and loaded.

    Args:
        shape: layers, experts per layer, experts per token.
        most_tokens: a longer request keeps its last ones; None keeps all.
    """

    def __init__(self, shape: tuple[int, int, int], most_tokens: int | None = None):
        self.shape = shape
        self._most_tokens = most_tokens
        self._rows: list[ScheduledTokens] = []
        self._requests: dict[str, _Running] = {}
        self._noted = 0
        self.unsound_tokens = 0
        """Left out so far."""
        self._make_buffers(1)

    @property
    def running(self) -> list[str]:
        """Requests that have begun and not ended."""
        return list(self._requests)

    def begin_step(self, rows: Sequence[ScheduledTokens]) -> None:
        """A forward pass over these rows starts; whatever the last one left unfinished is dropped."""
        self._rows = list(rows)
        self._noted = 0
        num_rows = sum(len(part.tokens) for part in rows)
        if len(self._experts) != num_rows:
            self._make_buffers(num_rows)

    def note(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """``layer`` routed the rows: ``[rows or more, K]``, rows beyond those of the step being padding."""
        num_rows = len(self._experts)
        if len(experts) != num_rows:
            experts, weights = experts[:num_rows], weights[:num_rows]
        self._experts_of[layer][...] = experts
        self._weights_of[layer][...] = weights
        self._noted += 1

    def note_all(self, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """All layers routed the rows: ``[layers, rows, K]``."""
        self._experts[...] = experts.transpose(1, 0, 2)
        self._weights[...] = weights.transpose(1, 0, 2)
        self._noted = self.shape[0]

    def end_step(self) -> list[RequestMaps]:
        """The pass is over: the new maps of each of its requests. None of them where a layer was not noted."""
        if not self._rows or self._noted != self.shape[0]:
            self._rows = []
            return []
        with np.errstate(over="ignore", invalid="ignore"):  # whatever comes of it is looked at next
            weights = routing_shares(self._weights).astype(np.float16)
        sound = sound_tokens(self._experts, weights, self.shape[1])
        experts = self._experts.astype(self._kept_type)
        maps, start = [], 0
        for part in self._rows:
            stop = start + len(part.tokens)
            running = self._requests.get(part.request)
            if running is None:
                running = self._requests[part.request] = _Running(part.prompt, part.position, self._most_tokens)
            first = start + max(0, running.next_position - part.position)
            last = max(first, stop - part.drafts)
            new = np.arange(first, last)
            kept = new[sound[first:last]]
            self.unsound_tokens += len(new) - len(kept)
            found = RequestMaps(part, part.tokens[kept - start], experts[kept], weights[kept])
            running.add(found, part.position + kept - start, part.position + last - start)
            maps.append(found)
            start = stop
        self._rows = []
        return maps

    def finish(self, request: str) -> Trace | None:
        """The trace of a request that has ended, which is then forgotten; None where nothing is known of it."""
        running = self._requests.pop(request, None)
        return None if running is None else running.trace(self.shape[1])

    @property
    def _kept_type(self) -> type[np.unsignedinteger]:
        return np.uint8 if self.shape[1] <= 256 else np.uint16

    def forget(self) -> None:
        """Nothing is known of any request any more."""
        self._rows = []
        self._requests.clear()

    def _make_buffers(self, rows: int) -> None:
        """For the maps of a step over so many rows; steps mostly have as many as the one before."""
        layers, _, top_k = self.shape
        self._experts = np.empty((rows, layers, top_k), np.int32)
        self._weights = np.empty((rows, layers, top_k), np.float32)
        self._experts_of = [self._experts[:, layer] for layer in range(layers)]
        self._weights_of = [self._weights[:, layer] for layer in range(layers)]


class _Running:
    """The maps of one request so far, in arrays with room for more: ``[room, ...]``, of which a part is filled."""

    def __init__(self, prompt: int, position: int, most_tokens: int | None):
        self.next_position = position
        self._prompt = prompt
        self._most_tokens = most_tokens
        self._filled = 0
        self._tokens = np.empty(0, np.int32)
        self._positions = np.empty(0, np.int64)
        self._experts: NDArray[np.unsignedinteger] = np.empty(0, np.uint8)
        self._weights: NDArray[np.float16] = np.empty(0, np.float16)

    def add(self, maps: RequestMaps, positions: NDArray[np.int64], next_position: int) -> None:
        """Tokens at these ``positions``; the request goes on at ``next_position``."""
        self.next_position = max(self.next_position, next_position)
        count = len(maps.tokens)
        if not count:
            return
        if self._filled + count > len(self._tokens):
            self._make_room(maps)
        new = slice(self._filled, self._filled + count)
        self._tokens[new], self._experts[new], self._weights[new] = maps.tokens, maps.experts, maps.weights
        self._positions[new] = positions
        self._filled += count

    def trace(self, num_experts: int) -> Trace | None:
        kept = self._kept
        count = kept.stop - kept.start
        if not count:
            return None
        return Trace(
            experts=self._experts[kept],
            weights=self._weights[kept],
            offsets=np.array([0, count], np.int64),
            num_experts=num_experts,
            tokens=self._tokens[kept],
            phase=np.where(self._positions[kept] < self._prompt, PREFILL, DECODE).astype(np.uint8),
        )

    @property
    def _kept(self) -> slice:
        """The last tokens, as many as are to be kept."""
        most = self._filled if self._most_tokens is None else self._most_tokens
        return slice(max(0, self._filled - most), self._filled)

    def _make_room(self, maps: RequestMaps) -> None:
        """For as many tokens again as are kept, and those of ``maps``; whatever need not be kept goes."""
        kept = self._kept
        self._filled = kept.stop - kept.start
        room = 2 * (self._filled + len(maps.tokens)) + _FIRST_ROOM
        if not len(self._tokens):
            self._experts = np.empty((0, *maps.experts.shape[1:]), maps.experts.dtype)
            self._weights = np.empty((0, *maps.weights.shape[1:]), np.float16)
        self._tokens = _moved(self._tokens[kept], room)
        self._positions = _moved(self._positions[kept], room)
        self._experts = _moved(self._experts[kept], room)
        self._weights = _moved(self._weights[kept], room)


_FIRST_ROOM = 64


def _moved(array: NDArray[Any], room: int) -> NDArray[Any]:
    larger = np.empty((room, *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
