"""Device memory that vLLM's largest step takes beside weights, slots and KV cache: an estimate. Pure arithmetic."""

MODEL_ROW_WIDTHS = 16
"""Activations of one token outside of experts, in rows of the model's width."""
SAMPLER_BYTES = 12
"""For each logit while tokens are sampled: its 4 bytes, a copy and a rank."""
GRAPH_BYTES = 512 << 20
"""For captured CUDA graphs."""


def estimated_activations(
    tokens: int, sequences: int, width: int, intermediate: int, top_k: int, vocabulary: int, element: int, graphs: bool
) -> int:
    """Bytes that vLLM's largest step takes beside weights, slots and KV cache.

    Experts have two workspaces for each choice of each token: the wider of both projections' results, and the wider of
    activation and output (vLLM's modular kernels). Logits are sampled in 32 bits.

    Args:
        tokens: of a step, at most.
        sequences: that are sampled in it, at most.
        width: of the model, as of one row of hidden states.
        intermediate: width between the projections of one expert on this rank.
        element: bytes of a number.
    """
    workspaces = top_k * (max(2 * intermediate, width) + max(intermediate, width))
    forward = tokens * (workspaces + MODEL_ROW_WIDTHS * width) * element
    return forward + sequences * vocabulary * SAMPLER_BYTES + (GRAPH_BYTES if graphs else 0)
