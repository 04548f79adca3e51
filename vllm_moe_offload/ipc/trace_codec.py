"""Traces as they travel between processes. What came from another process must never be trusted unchecked."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import TraceError
from ..trace.trace import Trace
from ..trace.trace_file import checked_trace
from .protocol import PackedTrace

Shape = tuple[int, int, int]
"""Layers, experts per layer, experts per token."""

_LONGEST_EMBEDDING = 1.05
"""Unit length, as float16 numbers have it; a longer one would seem near to everything."""


def pack_trace(trace: Trace) -> PackedTrace:
    """A trace as a message; its names, groups and flags stay behind."""
    return PackedTrace(
        lengths=_bytes(np.diff(trace.offsets), "<i4"),
        experts=_bytes(trace.experts, _expert_type(trace.num_experts)),
        weights=_bytes(trace.weights, "<f2"),
        tokens=None if trace.tokens is None else _bytes(trace.tokens, "<i4"),
        phase=None if trace.phase is None else _bytes(trace.phase, "u1"),
        embeddings=None if trace.embeddings is None or not trace.embeddings.size else _bytes(trace.embeddings, "<f2"),
    )


def unpack_trace(packed: PackedTrace, shape: Shape) -> Trace:
    """The inverse of ``pack_trace``, for a model of ``shape``; the arrays are the caller's own.

    Raises:
        ValueError: it is no sound trace of such a model; says why.
    """
    layers, experts, top_k = shape
    lengths = np.frombuffer(packed.lengths, "<i4").astype(np.int64)
    if (lengths < 0).any():
        raise ValueError("a request has fewer than no tokens")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    maps = (int(offsets[-1]), layers, top_k)
    fields = {
        "num_experts": np.array(experts),
        "offsets": offsets,
        "experts": _array(packed.experts, _expert_type(experts), maps),
        "weights": _array(packed.weights, "<f2", maps),
    }
    if packed.tokens is not None:
        fields["tokens"] = _array(packed.tokens, "<i4", maps[:1])
    if packed.phase is not None:
        fields["phase"] = _array(packed.phase, "u1", maps[:1])
    if packed.embeddings:
        fields["embeddings"] = _array(packed.embeddings, "<f2", (len(lengths), -1))
    try:
        trace = checked_trace("a trace that was sent", fields)
    except TraceError as error:
        raise ValueError(str(error)) from None
    if trace.embeddings is not None:
        _check_lengths(trace.embeddings)
    return trace


def pack_embedding(embedding: NDArray[np.floating] | None) -> bytes:
    """A prompt embedding as it travels; None is empty."""
    return b"" if embedding is None else _bytes(embedding, "<f4")


def unpack_embedding(data: bytes) -> NDArray[np.float32] | None:
    """The inverse of ``pack_embedding``.

    Raises:
        ValueError: no whole number of floats, or numbers that are not finite or too long to be a unit vector.
    """
    if not data:
        return None
    embedding = np.frombuffer(data, "<f4").astype(np.float32)
    _check_lengths(embedding[None])
    return embedding


def _check_lengths(embeddings: NDArray[np.floating]) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(embeddings.astype(np.float32), axis=1)
    if not (norms <= _LONGEST_EMBEDDING).all():
        raise ValueError("an embedding is longer than a unit vector, or not finite")


def _expert_type(experts: int) -> str:
    return "u1" if experts <= 256 else "<u2"


def _bytes(array: NDArray, dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _array(data: bytes, dtype: str, shape: Sequence[int]) -> NDArray:
    return np.frombuffer(data, dtype).reshape(shape).copy()
