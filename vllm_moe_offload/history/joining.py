"""Several traces of one model as one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .trace import Trace


def join(traces: Sequence[Trace], shape: tuple[int, int, int]) -> Trace:
    """The requests of all ``traces`` in order. What only some of them know (tokens, embeddings, …) is left out.

    Args:
        shape: of the traces; also what an empty sequence becomes a trace of.
    """
    layers, experts, top_k = shape
    dtype = np.uint8 if experts <= 256 else np.uint16
    offsets = np.concatenate([[0], *(np.diff(trace.offsets) for trace in traces)]).cumsum().astype(np.int64)
    return Trace(
        experts=np.concatenate([np.empty((0, layers, top_k), dtype), *(trace.experts for trace in traces)]),
        weights=np.concatenate([np.empty((0, layers, top_k), np.float16), *(trace.weights for trace in traces)]),
        offsets=offsets,
        num_experts=experts,
        tokens=_column(traces, "tokens"),
        phase=_column(traces, "phase"),
        embeddings=_column(traces, "embeddings"),
    )


def _column(traces: Sequence[Trace], name: str) -> NDArray | None:
    arrays = [getattr(trace, name) for trace in traces]
    return None if not arrays or any(array is None for array in arrays) else np.concatenate(arrays)
