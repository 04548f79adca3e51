"""The trace: which experts each token of each request was routed to, and how strongly.

Only values live here. Files are read and written by ``trace_file``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DECODE = 0
PREFILL = 1
MOST_EXPERTS = 1 << 16
"""Per layer: their numbers are uint8 or uint16."""
UNKNOWN_TOKEN = -1
_WEIGHT_SUM_TOLERANCE = 0.02  # float16 weights, renormalised by the recorder


class Column(NamedTuple):
    """An optional array of a trace, one entry per token or per request."""

    name: str
    per_request: bool
    unknown: int | None
    """Stands for an entry that nobody recorded. None for labels, which are left out when traces are concatenated."""


COLUMNS = (
    Column("tokens", per_request=False, unknown=UNKNOWN_TOKEN),
    Column("phase", per_request=False, unknown=DECODE),
    Column("embeddings", per_request=True, unknown=0),
    Column("group", per_request=True, unknown=None),
    Column("repetitive", per_request=True, unknown=None),
)
"""A new one is listed here, among the fields of ``Trace``, and in ``trace_file``, which checks it."""


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
    """``[R, D]``: the prompt embedding of each request, a unit vector."""
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

    def columns(self) -> dict[str, NDArray]:
        """The optional arrays that this trace has, by name."""
        values = {column.name: getattr(self, column.name) for column in COLUMNS}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def nbytes(self) -> int:
        """Bytes its arrays of tokens and requests take."""
        return sum(array.nbytes for array in (self.experts, self.weights, *self.columns().values()))

    def request(self, index: int) -> "Trace":
        """The trace of one request. Arrays are views."""
        rows = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self._take(rows, slice(index, index + 1), np.array([0, rows.stop - rows.start], np.int64))

    def requests(self) -> Iterator["Trace"]:
        """Each request's own trace, in order."""
        return (self.request(index) for index in range(self.num_requests))

    def rows(self, rows: slice) -> "Trace":
        """Some of the tokens of a trace of one request. Arrays are views."""
        assert self.num_requests == 1
        count = len(range(*rows.indices(self.num_tokens)))
        return self._take(rows, slice(None), np.array([0, count], np.int64))

    def select(self, indices: Sequence[int] | NDArray[np.integer]) -> "Trace":
        """A trace of these requests only, in the order given. Arrays are copies."""
        indices = np.asarray(indices, np.int64)
        lengths = np.diff(self.offsets)[indices]
        rows = np.concatenate(
            [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices] or [np.empty(0, np.int64)]
        )
        return self._take(rows, indices, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))

    def filled(self, like: "Trace") -> "Trace":
        """With every column that ``like`` has, what is unknown here being ``Column.unknown``. Labels are not filled."""
        missing: dict[str, Any] = {}
        for column in COLUMNS:
            wanted = getattr(like, column.name)
            if column.unknown is not None and wanted is not None and getattr(self, column.name) is None:
                length = self.num_requests if column.per_request else self.num_tokens
                missing[column.name] = np.full((length, *wanted.shape[1:]), column.unknown, wanted.dtype)
        return replace(self, **missing) if missing else self

    def _take(self, rows: slice | NDArray, requests: slice | NDArray, offsets: NDArray[np.int64]) -> "Trace":
        taken: dict[str, Any] = {
            column.name: array[requests if column.per_request else rows]
            for column in COLUMNS
            if (array := getattr(self, column.name)) is not None
        }
        return replace(self, experts=self.experts[rows], weights=self.weights[rows], offsets=offsets, **taken)

    def without_repetitive(self) -> "Trace":
        """The trace without requests flagged ``repetitive``."""
        if self.repetitive is None or not self.repetitive.any():
            return self
        return self.select(np.flatnonzero(~self.repetitive))


def concat(traces: Sequence[Trace], shape: tuple[int, int, int]) -> Trace:
    """The requests of all ``traces`` in order. A column that only some of them have is left out, as labels are.

    Args:
        shape: of the traces; also what an empty sequence becomes a trace of.
    """
    assert all(trace.shape == shape for trace in traces), "traces of different models"
    layers, experts, top_k = shape
    dtype = np.uint8 if experts <= 256 else np.uint16
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        arrays = [getattr(trace, column.name) for trace in traces]
        if column.unknown is not None and arrays and all(array is not None for array in arrays):
            columns[column.name] = np.concatenate(arrays)
    return Trace(
        experts=np.concatenate([np.empty((0, layers, top_k), dtype), *(trace.experts for trace in traces)]),
        weights=np.concatenate([np.empty((0, layers, top_k), np.float16), *(trace.weights for trace in traces)]),
        offsets=np.concatenate([[0], *(np.diff(trace.offsets) for trace in traces)]).cumsum().astype(np.int64),
        num_experts=experts,
        model=traces[-1].model if traces else "",
        **columns,
    )


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
