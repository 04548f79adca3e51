"""An eviction policy that also knows what the running step is about to use.

It wraps any policy: what the wrapped one would keep longest is kept, unless the step's predictions say otherwise.
"""

import numpy as np
from numpy.typing import NDArray

from ..cache.base import EvictionPolicy, FloatArray, IntArray

_FORESIGHT_WEIGHT = 2.0
"""A certain use ahead outweighs any rank; a probability of one half is worth the whole ranking."""


class ForesightPolicy(EvictionPolicy):
    """Ranks experts by the wrapped policy (0 to 1) and adds what ``expected`` says of the layers ahead."""

    def __init__(self, policy: EvictionPolicy, num_experts: int):
        self._policy = policy
        self._ranks = np.arange(num_experts)
        self.expected: NDArray[np.float32] = np.zeros(num_experts, np.float32)
        """Per flat id, the probability that the running step will still use it. Written by whoever predicts."""

    def begin_step(self) -> None:
        self.expected[:] = 0
        self._policy.begin_step()

    def use(self, experts: IntArray) -> None:
        self._policy.use(experts)

    def load(self, experts: IntArray) -> None:
        self._policy.load(experts)

    def keep_scores(self, experts: IntArray) -> FloatArray:
        worth = self._policy.keep_scores(experts)
        if not self.expected.any():
            return worth
        scores = np.empty(len(experts))
        scores[worth.argsort(kind="stable")] = self._ranks[: len(experts)]
        scores /= max(1, len(experts))
        scores += _FORESIGHT_WEIGHT * self.expected[experts]
        return scores
