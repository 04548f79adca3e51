"""The trace: which experts each token of each request was routed to, and how strongly.

Only values live here. Files are read and written by ``trace_file``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

DECODE = 0
PREFILL = 1
MOST_EXPERTS = 1 << 16
"""Per layer: their numbers are uint8 or uint16."""
_WEIGHT_SUM_TOLERANCE = 0.02  # float16 weights, renormalised by the recorder


@dataclass(frozen=True)
class Trace:
    """Expert maps of ``R`` requests with ``T`` tokens in all, through ``L`` MoE layers of ``num_experts`` experts.

    Tokens of a request are contiguous and in order: request ``r`` owns rows ``offsets[r]`` to ``offsets[r + 1]``.
    """

    experts: NDArray[np.unsignedinteger]
    """``[T, L, K]`` uint8 or uint16: the chosen experts, distinct within a token and layer."""
    weights: NDArray[np.float16]
    """``[T, L, K]``: routing weights of the chosen experts, summing to 1 per token and layer."""
    offsets: NDArray[np.int64]
    """``[R + 1]``, from 0 to T."""
    num_experts: int
    model: str = ""
    fingerprint: str = ""
    """Of the model's weights; empty when the recorder did not know."""
    tokens: NDArray[np.int32] | None = None
    """``[T]``: the token each forward pass read; None when the recorder did not know."""
    phase: NDArray[np.uint8] | None = None
    """``[T]``: DECODE or PREFILL; None means all tokens were decoded."""
    embeddings: NDArray[np.float16] | None = None
    """``[R, D]``: one unit vector of meaning per request."""
    group: NDArray[np.str_] | None = None
    """``[R]``: what kind of request it was; requests of one group are alike."""
    repetitive: NDArray[np.bool_] | None = None
    """``[R]``: the answer fell into a loop and says little about routing."""

    @property
    def num_tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.experts.shape[2])

    @property
    def num_requests(self) -> int:
        return len(self.offsets) - 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, experts per layer, experts per token: equal for all traces of one model."""
        return self.num_layers, self.num_experts, self.top_k

    def request(self, index: int) -> "Trace":
        """The trace of one request. Arrays of tokens are views."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return replace(
            self,
            experts=self.experts[rows],
            weights=self.weights[rows],
            offsets=np.array([0, rows.stop - rows.start], np.int64),
            tokens=None if self.tokens is None else self.tokens[rows],
            phase=None if self.phase is None else self.phase[rows],
            embeddings=None if self.embeddings is None else self.embeddings[index : index + 1],
            group=None if self.group is None else self.group[index : index + 1],
            repetitive=None if self.repetitive is None else self.repetitive[index : index + 1],
        )

    def requests(self) -> Iterator["Trace"]:
        """Each request's own trace, in order."""
        return (self.request(index) for index in range(self.num_requests))

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> "Trace":
        """A trace of these requests only, in the order given."""
        indices = np.asarray(indices, np.int64)
        lengths = np.diff(self.offsets)[indices]
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices] or [np.empty(0, np.int64)]
        )
        return replace(
            self,
            experts=self.experts[rows],
            weights=self.weights[rows],
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            tokens=None if self.tokens is None else self.tokens[rows],
            phase=None if self.phase is None else self.phase[rows],
            embeddings=None if self.embeddings is None else self.embeddings[indices],
            group=None if self.group is None else self.group[indices],
            repetitive=None if self.repetitive is None else self.repetitive[indices],
        )

    def without_repetitive(self) -> "Trace":
        """The trace without requests flagged ``repetitive``."""
        if self.repetitive is None or not self.repetitive.any():
            return self
        return self.select(np.flatnonzero(~self.repetitive))


def names_each_once(experts: NDArray[np.integer]) -> NDArray[np.bool_]:
    """For each token of ``[T, L, K]``, whether no layer names an expert twice."""
    ordered = np.sort(experts, axis=2)
    repeated: NDArray[np.bool_] = (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))
    return ~repeated


def sums_to_one(weights: NDArray[np.floating]) -> NDArray[np.bool_]:
    """For each token of ``[T, L, K]``, whether the weights of every layer are shares: not negative, 1 together."""
    with np.errstate(invalid="ignore"):
        sums = weights.sum(axis=2, dtype=np.float32)
    return (weights >= 0).all(axis=(1, 2)) & (np.abs(sums - 1) <= _WEIGHT_SUM_TOLERANCE).all(axis=1)


def sound_tokens(experts: NDArray[np.integer], weights: NDArray[np.floating], num_experts: int) -> NDArray[np.bool_]:
    """Which tokens of the maps ``[T, L, K]`` a trace can hold: what is kept satisfies it, what is read must."""
    in_range = ((experts >= 0) & (experts < num_experts)).all(axis=(1, 2))
    sound: NDArray[np.bool_] = in_range & names_each_once(experts) & sums_to_one(weights)
    return sound
