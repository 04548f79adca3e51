"""Prompt embeddings: the mean of a prompt's token embeddings, at unit length."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

TokenRows = Callable[[NDArray[np.integer]], NDArray[np.float32]]
"""Vectors ``[n, D]`` of tokens ``[n]``."""

CHUNK_TOKENS = 512
"""So many vectors are in memory at once, however long a prompt is."""


def mean_embedding(prompt: NDArray[np.integer], rows: TokenRows) -> NDArray[np.float32]:
    """Unit vector ``[D]`` of a prompt of tokens ``[T]``; zero when they cancel out or T is 0."""
    tokens, counts = np.unique(prompt, return_counts=True)
    total = np.zeros(rows(tokens[:0]).shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for first in range(0, len(tokens), CHUNK_TOKENS):
            part = slice(first, first + CHUNK_TOKENS)
            total += counts[part].astype(np.float32) @ rows(tokens[part])
        return unit(total / np.float32(max(1, len(prompt))))


def unit(vector: NDArray[np.floating]) -> NDArray[np.float32]:
    """``vector`` at unit length; zero where it has no direction: it is zero, or not finite."""
    with np.errstate(all="ignore"):  # a vector of huge numbers is none either
        vector = vector.astype(np.float32)
        length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if 0 < length < np.inf else np.zeros_like(vector)
