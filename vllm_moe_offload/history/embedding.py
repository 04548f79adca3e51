"""A request's meaning as one vector: the mean of its prompt's token embeddings, at unit length."""

import numpy as np
from numpy.typing import NDArray


def mean_embedding(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Unit vector ``[D]`` from the token embeddings ``[T, D]`` of a prompt; zero when they cancel out or T is 0."""
    if not len(vectors):
        return np.zeros(vectors.shape[1], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = vectors.mean(axis=0, dtype=np.float32)
    return unit(mean)


def unit(vector: NDArray[np.floating]) -> NDArray[np.float32]:
    """``vector`` at unit length; zero where it has no direction: it is zero, or not finite."""
    with np.errstate(all="ignore"):  # a vector of huge numbers is none either
        vector = vector.astype(np.float32)
        length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if 0 < length < np.inf else np.zeros_like(vector)
