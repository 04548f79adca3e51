"""The contract of an eviction policy."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]


class EvictionPolicy(ABC):
    """Says how much each expert is worth keeping.

    Experts are flat ids ``0 … N-1`` over all layers that share a slot pool. A policy only remembers and scores: it
    never sees pins or free slots, which belong to the cache. The engine's forward passes are its only
    clock (``begin_step``), so that the same policy gives the same decisions in the engine and in replay.

    A policy is made as ``Class(layer_of)``, int ``[N]``: the layer of each expert. It is called while a layer waits, so
    every method must take microseconds; what it raises ends the engine.
    """

    @abstractmethod
    def begin_step(self) -> None:
        """A forward pass starts."""

    @abstractmethod
    def use(self, experts: IntArray) -> None:
        """The running forward pass reads these distinct experts."""

    def load(self, experts: IntArray) -> None:  # noqa: B027 - most policies do not care how long an expert has been in
        """These distinct experts have just been given slots."""

    @abstractmethod
    def keep_scores(self, experts: IntArray) -> FloatArray:
        """Worth of keeping each expert, a new float64 array of the same length. The lowest is evicted first."""
