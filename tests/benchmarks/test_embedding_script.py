"""The measurement of embeddings tells apart embeddings that say how a request routes and ones that do not."""

from dataclasses import replace

import embedding
import numpy as np
import pytest

from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.trace.trace import Trace

REQUESTS, TOKENS = 6, 12


@pytest.fixture
def trace() -> Trace:
    """Requests of two domains, which take turns and share no expert; embeddings name the domain."""
    rng = np.random.default_rng(0)
    domain = np.arange(REQUESTS) % 2
    chosen = (
        np.argsort(rng.random((REQUESTS * TOKENS, 4, 4)), axis=2)[:, :, :2]
        + 4 * np.repeat(domain, TOKENS)[:, None, None]
    )
    return Trace(
        experts=chosen.astype(np.uint8),
        weights=np.full(chosen.shape, 0.5, np.float16),
        offsets=np.arange(REQUESTS + 1) * TOKENS,
        num_experts=8,
        phase=np.tile((np.arange(TOKENS) < 4).astype(np.uint8), REQUESTS),
        embeddings=np.eye(2, dtype=np.float16)[domain],
        group=np.array(["prose", "code"])[domain],
    )


def first_layer_recall(trace: Trace, way: str) -> float:
    """From the step's start, when only the choice of candidates can tell domains apart."""
    accuracy = Accuracy(4, 2, (0,), (4,))
    for request in range(REQUESTS):
        embedding.predict(trace, request, embedding.orders(trace)[way](request), TOKENS, accuracy)
    return float(accuracy.recall(0, 4).mean())


def test_meaning_that_tells_domains_apart_finds_the_right_candidates(trace):
    assert first_layer_recall(trace, "by prompt embedding") == first_layer_recall(trace, "same group") == 1
    assert first_layer_recall(trace, "random") < 0.9
    assert first_layer_recall(trace, "recent") < 0.5


def test_meaning_that_tells_nothing_finds_nothing(trace):
    misleading = replace(trace, embeddings=np.eye(REQUESTS, dtype=np.float16))
    assert first_layer_recall(misleading, "by prompt embedding") < 1


def test_nobody_is_predicted_from_itself_and_only_what_was_generated_is(trace):
    for order in embedding.orders(trace).values():
        for request in range(REQUESTS):
            assert sorted([*order(request), request]) == list(range(REQUESTS))
    assert embedding.generated(trace.request(0)).num_tokens == TOKENS - 4
