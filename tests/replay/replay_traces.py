"""Traces of any shape, for tests that must hold for other models too."""

import numpy as np

from vllm_moe_offload.trace.trace import Trace


def random_trace(layers, experts, top_k, lengths, seed=0, tokens=True, width=4, prefill=0) -> Trace:
    """Requests of the given ``lengths``, routed at random; the first ``prefill`` tokens of each are its prompt."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths)
    chosen = np.argsort(rng.random((rows, layers, experts)), axis=2)[:, :, :top_k]
    weights = rng.random((rows, layers, top_k)) + 0.1
    embeddings = rng.standard_normal((len(lengths), width)).astype(np.float32)
    position = np.concatenate([np.arange(length) for length in lengths])
    return Trace(
        experts=chosen.astype(np.uint8 if experts <= 256 else np.uint16),
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_experts=experts,
        tokens=rng.integers(0, 9, rows).astype(np.int32) if tokens else None,
        phase=(position < prefill).astype(np.uint8) if prefill else None,
        embeddings=(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float16)
        if width
        else None,
    )
