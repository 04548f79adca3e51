"""A vector for every token: the model's own embedding, or a learned one where only token numbers are known."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .base import UNKNOWN_TOKEN

Array = NDArray[np.float32]


_AT_ONCE = 512
"""Tokens whose vectors are computed together; only the result is as long as the input."""


class TokenVectors(ABC):
    """Vectors of one fixed length; an unknown token's is zero."""

    width: int

    @abstractmethod
    def look_up(self, tokens: NDArray[np.integer]) -> Array:
        """float32 ``[B, width]`` for tokens ``[B]``."""

    @abstractmethod
    def learn(self, tokens: NDArray[np.integer], gradient: Array, rate: float) -> None:
        """One optimiser step against ``gradient`` ``[B, width]``."""


class ModelVectors(TokenVectors):
    """The model's own embeddings: know every token, and never change."""

    def __init__(self, embed: Callable[[NDArray[np.integer]], NDArray[np.floating]], width: int):
        """``embed``: float ``[B, width]`` for tokens ``[B]``, none of them UNKNOWN_TOKEN."""
        self.width = width
        self._embed = embed

    def look_up(self, tokens: NDArray[np.integer]) -> Array:
        vectors = np.zeros((len(tokens), self.width), np.float32)
        known = np.flatnonzero(tokens != UNKNOWN_TOKEN)
        for part in np.split(known, range(_AT_ONCE, len(known), _AT_ONCE)):
            raw = np.asarray(self._embed(tokens[part]), np.float32)
            vectors[part] = raw * (np.sqrt(self.width) / (np.linalg.norm(raw, axis=1, keepdims=True) + 1e-6))
        return vectors

    def learn(self, tokens: NDArray[np.integer], gradient: Array, rate: float) -> None:
        pass


class LearnedVectors(TokenVectors):
    """One learned row per token seen in training, by Adam on the rows a batch touches."""

    def __init__(self, width: int = 96, seed: int = 0):
        self.width = width
        self.known: dict[int, int] = {}
        self._rng = np.random.default_rng(seed)
        self.rows = np.zeros((1, width), np.float32)
        self._reset_moments()

    @classmethod
    def from_rows(cls, tokens: NDArray[np.int64], rows: Array) -> "LearnedVectors":
        """Vectors learned earlier: ``rows[i + 1]`` is that of ``tokens[i]``, ``rows[0]`` is zero."""
        if rows.shape[:1] != (len(tokens) + 1,):
            raise ValueError(f"{len(tokens)} tokens need {len(tokens) + 1} vectors, got {rows.shape}")
        self = cls(rows.shape[1])
        self.known = {int(token): place + 1 for place, token in enumerate(tokens)}
        self.rows = rows
        self._reset_moments()
        return self

    def grow(self, tokens: NDArray[np.integer]) -> None:
        """Give a row to every token that has none yet."""
        new = [int(token) for token in np.unique(tokens) if token != UNKNOWN_TOKEN and int(token) not in self.known]
        for token in new:
            self.known[token] = len(self.known) + 1
        fresh = self._rng.standard_normal((len(new), self.width), np.float32) * np.float32(0.3)
        self.rows = np.concatenate([self.rows, fresh])
        self._reset_moments()

    def look_up(self, tokens: NDArray[np.integer]) -> Array:
        return self.rows[self._index(tokens)]

    def learn(self, tokens: NDArray[np.integer], gradient: Array, rate: float) -> None:
        touched, inverse = np.unique(self._index(tokens), return_inverse=True)
        slope = np.zeros((len(touched), self.width), np.float32)
        np.add.at(slope, inverse, gradient)
        mean = self._mean[touched] = 0.9 * self._mean[touched] + 0.1 * slope
        square = self._square[touched] = 0.99 * self._square[touched] + 0.01 * slope * slope
        updates = self._updates[touched] = self._updates[touched] + 1
        corrected = np.sqrt(square / (1 - 0.99**updates)[:, None]) + 1e-8
        self.rows[touched] -= np.float32(rate) * (mean / (1 - 0.9**updates)[:, None] / corrected).astype(np.float32)
        self.rows[0] = 0

    def _index(self, tokens: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.fromiter((self.known.get(int(token), 0) for token in tokens), np.int64, len(tokens))

    def _reset_moments(self) -> None:
        self._mean = np.zeros_like(self.rows)
        self._square = np.zeros_like(self.rows)
        self._updates = np.zeros(len(self.rows), np.int64)
