"""Adam (Kingma and Ba, 2015) over one flat parameter vector, in blocks that stay in the processor's cache."""

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 15


class Adam:
    """First and second moments of the gradient of ``size`` parameters."""

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
