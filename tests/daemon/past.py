"""Requests that have ended, for tests of what is remembered of them."""

import numpy as np

from vllm_moe_offload.trace.trace import Trace

SHAPE = (4, 8, 2)
FINGERPRINT = "ab" * 16
WIDTH = 6


def past_request(seed: int, tokens: int = 5, axis: int | None = None, experts: int = SHAPE[1]) -> Trace:
    """A request of its own kind: everything in it follows from ``seed``. ``axis``: of its prompt embedding."""
    draw = np.random.default_rng(seed)
    layers, _, top_k = SHAPE
    chosen = np.argsort(draw.random((tokens, layers, experts)), axis=2)[:, :, :top_k]
    weights = draw.random((tokens, layers, top_k)) + 0.1
    axis = seed % WIDTH if axis is None else axis
    return Trace(
        experts=chosen.astype(np.uint8 if experts <= 256 else np.uint16),
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        offsets=np.array([0, tokens], np.int64),
        num_experts=experts,
        tokens=draw.integers(0, 100, tokens).astype(np.int32),
        phase=(np.arange(tokens) < tokens // 2).astype(np.uint8),
        embeddings=np.eye(WIDTH, dtype=np.float16)[axis][None],
    )


def same(one: Trace, other: Trace) -> bool:
    """Whether both hold the same requests with all that is known of them."""
    names = ("experts", "weights", "offsets", "tokens", "phase", "embeddings")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    return all(mine is theirs if mine is None else np.array_equal(mine, theirs) for mine, theirs in pairs)
