"""Puts together what the layers of each step route to, token by token, until a request ends and is a trace.

Pure bookkeeping: it must never ask who is resident, and never keep an array that belongs to the engine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .trace import DECODE, PREFILL, Trace


class RequestRows(NamedTuple):
    """The rows of one request in a step: consecutive tokens, in the order in which the forward pass reads them."""

    request: str
    position: int
    """Of the first of them within the request."""
    tokens: NDArray[np.int32]
    prompt: int
    """Tokens of the request that were given rather than generated."""
    drafts: int = 0
    """How many of the last rows are guesses of a speculative decoder, which may come to nothing."""

    @property
    def is_prefill(self) -> bool:
        return self.position < self.prompt


class RequestMaps(NamedTuple):
    """What the rows of one request were routed to: ``experts`` and ``weights`` are ``[tokens, L, K]``.

    Only tokens that had not been seen before: a request that was preempted runs again over what it has been through.
    """

    rows: RequestRows
    tokens: NDArray[np.int32]
    experts: NDArray[np.unsignedinteger]
    weights: NDArray[np.float16]


class Recorder:
    """The maps of running requests.

    Args:
        shape: layers, experts per layer, experts per token.
        most_tokens: a longer request keeps its last ones; None keeps all.
    """

    def __init__(self, shape: tuple[int, int, int], most_tokens: int | None = None):
        self.shape = shape
        self._most_tokens = most_tokens
        self._rows: list[RequestRows] = []
        self._requests: dict[str, _Running] = {}
        self._num_rows = 0
        self._noted = 0
        self._experts = np.empty((0, 0, 0), np.uint8)
        self._weights = np.empty((0, 0, 0), np.float32)

    @property
    def running(self) -> list[str]:
        """Requests that have begun and not ended."""
        return list(self._requests)

    def begin_step(self, rows: Sequence[RequestRows]) -> None:
        """A forward pass over these rows starts; whatever the last one left unfinished is dropped."""
        self._rows = list(rows)
        self._num_rows = sum(len(part.tokens) for part in rows)
        self._noted = 0
        layers, experts, top_k = self.shape
        if self._experts.shape[1] < self._num_rows:
            size = (layers, max(16, self._num_rows), top_k)
            self._experts = np.empty(size, np.uint8 if experts <= 256 else np.uint16)
            self._weights = np.empty(size, np.float32)

    def note(self, layer: int, experts: NDArray[np.integer], weights: NDArray[np.floating]) -> None:
        """``layer`` routed the rows: ``[rows or more, K]``, rows beyond those of the step being padding."""
        self._experts[layer, : self._num_rows] = experts[: self._num_rows]
        self._weights[layer, : self._num_rows] = weights[: self._num_rows]
        self._noted += 1

    def end_step(self) -> list[RequestMaps]:
        """The pass is over: the new maps of each of its requests. None of them where a layer was not heard of."""
        if not self._rows or self._noted != self.shape[0]:
            self._rows = []
            return []
        experts = np.ascontiguousarray(self._experts[:, : self._num_rows].transpose(1, 0, 2))
        weights = self._weights[:, : self._num_rows].transpose(1, 0, 2)
        weights = (weights / np.maximum(weights.sum(axis=2, keepdims=True), 1e-9)).astype(np.float16)
        maps, start = [], 0
        for part in self._rows:
            stop = start + len(part.tokens)
            new = self._requests.setdefault(part.request, _Running(part.prompt, part.position))
            first = start + max(0, new.next_position - part.position)
            last = max(first, stop - part.drafts)
            kept = RequestMaps(
                part, part.tokens[first - start : last - start], experts[first:last], weights[first:last]
            )
            new.add(kept, part.position + first - start, self._most_tokens)
            maps.append(kept)
            start = stop
        self._rows = []
        return maps

    def trace(self, request: str) -> Trace | None:
        """A running request's trace so far, or None where nothing is known of it."""
        running = self._requests.get(request)
        if running is None or not running.parts:
            return None
        tokens = np.concatenate([part.tokens for part in running.parts])
        return Trace(
            experts=np.concatenate([part.experts for part in running.parts]),
            weights=np.concatenate([part.weights for part in running.parts]),
            offsets=np.array([0, len(tokens)], np.int64),
            num_experts=self.shape[1],
            tokens=tokens.astype(np.int32),
            phase=np.where(np.concatenate(running.positions) < running.prompt, PREFILL, DECODE).astype(np.uint8),
        )

    def finish(self, request: str) -> Trace | None:
        """The trace of a request that has ended, which is then forgotten; None where nothing is known of it."""
        trace = self.trace(request)
        self._requests.pop(request, None)
        return trace


class _Running:
    """The maps of one request so far, one part per step."""

    def __init__(self, prompt: int, position: int):
        self.prompt = prompt
        self.next_position = position
        self.parts: list[RequestMaps] = []
        self.positions: list[NDArray[np.int64]] = []
        self._num_tokens = 0

    def add(self, maps: RequestMaps, position: int, most_tokens: int | None) -> None:
        count = len(maps.tokens)
        if not count:
            return
        self.parts.append(maps)
        self.positions.append(np.arange(position, position + count))
        self.next_position = position + count
        self._num_tokens += count
        while most_tokens is not None and self._num_tokens - len(self.parts[0].tokens) >= most_tokens:
            self._num_tokens -= len(self.parts.pop(0).tokens)
            self.positions.pop(0)
