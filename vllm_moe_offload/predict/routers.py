"""How a layer chooses experts from its router's logits, for whoever wants to know how close a choice was."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


class Router(NamedTuple):
    """The router of one MoE layer."""

    logits: Callable[[Array], Array]
    """``[B, E]`` from what the router reads, ``[B, h]``."""
    scoring: str = "softmax"
    """One of SCORINGS."""
    bias: Array | None = None
    """``[E]``, added to the scores when experts are chosen: DeepSeek-V3's correction bias, not that of the logits."""
    groups: int = 1
    """Experts are chosen within the best ``kept_groups`` of so many groups of equal size."""
    kept_groups: int = 1

    def margins(self, hidden: Array, top_k: int) -> Array:
        """How far each expert is from changing sides, ``[B, E]``: the ``top_k`` chosen ones are above zero.

        In units of the scores' spread in the row, so that layers and tokens can be compared.
        """
        scores = self._scores(self.logits(hidden))
        spread = scores.std(axis=1, keepdims=True) + 1e-6
        if self.groups == 1:
            return (scores - _line(scores, top_k)) / spread
        grouped = scores.reshape(len(scores), self.groups, -1)
        best = np.sort(grouped, axis=2)
        standing = best[:, :, -1] if self.bias is None else best[:, :, -2:].sum(axis=2)
        standing -= _line(standing, self.kept_groups)
        open_to_choice = np.where(standing[:, :, None] > 0, grouped, -np.inf).reshape(scores.shape)
        own = scores - _line(open_to_choice, top_k)
        return np.minimum(own, standing.repeat(grouped.shape[2], axis=1)) / spread

    def _scores(self, logits: Array) -> Array:
        """What experts are ranked by. Without a bias the logits will do: every scoring keeps their order."""
        if self.bias is None:
            return logits
        if self.scoring == "softmax":
            scores = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        elif self.scoring == "sigmoid":
            scores = 1 / (1 + np.exp(-logits))
        else:
            scores = np.sqrt(np.logaddexp(logits, 0))
        return scores + self.bias


def _line(scores: Array, count: int) -> Array:
    """``[B, 1]``: half way between the last of the ``count`` best and the first of the others."""
    if count >= scores.shape[1]:
        return scores.min(axis=1, keepdims=True) - 1
    place = scores.shape[1] - count
    around = np.partition(scores, (place - 1, place), axis=1)
    above, below = around[:, place : place + 1], around[:, place - 1 : place]
    return np.where(np.isfinite(below), (above + below) / 2, above - 1)
