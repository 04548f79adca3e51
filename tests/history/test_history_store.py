import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace_file import make_trace

from vllm_moe_offload.history.store import HistoryStore

SHAPE = (4, 8, 2)


def request(embedding=None, tokens=4, seed=0):
    trace = make_trace((tokens,), seed=seed)
    if embedding is not None:
        trace.embeddings[0] = np.asarray(embedding) / np.linalg.norm(embedding)
    return trace


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=25), st.integers(200, 4000))
def test_never_more_than_the_budget(lengths, budget):
    store = HistoryStore(SHAPE, budget)
    for seed, tokens in enumerate(lengths):
        store.add(request(tokens=tokens, seed=seed))
        store.check_integrity()
    store.prune(budget // 2)
    store.check_integrity()


def test_the_newest_request_is_kept_and_one_chat_does_not_push_out_a_rare_domain():
    store = HistoryStore(SHAPE, 12_000)
    rare = request([0, 0, 0, 0, 0, 1], seed=1)
    store.add(rare)
    for seed in range(200):
        store.add(request(np.array([1, 0, 0, 0, 0, 0]) + np.random.default_rng(seed).normal(0, 0.05, 6), seed=seed))
    kept = store.to_trace()
    assert 10 < len(store.requests) < 150
    assert (kept.embeddings @ rare.embeddings[0] > 0.9).any()
    assert store.requests[-1].number == 200


def test_a_long_request_keeps_its_last_tokens_and_leaves_room():
    store = HistoryStore(SHAPE, 16_000)
    long = request(tokens=3000)
    store.add(long)
    kept = store.requests[0].trace
    assert 0 < kept.num_tokens < 3000 and store.nbytes <= 1100
    assert np.array_equal(kept.experts, long.experts[-kept.num_tokens :])


def test_nearest_in_meaning_comes_first_and_the_most_recent_when_meaning_is_unknown():
    store = HistoryStore(SHAPE)
    axes = np.eye(6)
    store.extend(request(axes[i], seed=i) for i in range(5))
    assert [past.number for past in store.nearest(axes[2] + 0.1 * axes[4], 2)] == [2, 4]
    assert [past.number for past in store.nearest(None, 2)] == [4, 3]
    assert HistoryStore(SHAPE).nearest(axes[0], 3) == []


def test_to_trace_gives_back_what_was_added():
    store = HistoryStore(SHAPE)
    trace = make_trace((3, 2, 5))
    store.extend(trace.requests())
    kept = store.to_trace()
    for name in ("experts", "weights", "offsets", "tokens", "phase", "embeddings"):
        assert np.array_equal(getattr(kept, name), getattr(trace, name))
    assert HistoryStore(SHAPE).to_trace().num_tokens == 0


def test_maps_of_another_model_are_refused():
    with pytest.raises(ValueError, match="shape"):
        HistoryStore((5, 8, 2)).add(request())
