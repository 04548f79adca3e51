from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace_file import make_trace

from vllm_moe_offload.trace.history import HistoryStore

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
        assert store.nbytes <= budget
        store.check_integrity()
    store.prune(budget // 2)
    assert store.nbytes <= budget // 2
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


def test_what_some_requests_lack_is_filled_up_and_the_others_keep_theirs():
    bare = replace(request(tokens=3, seed=1), tokens=None, phase=None, embeddings=None)
    known = request(np.eye(6)[2], tokens=2, seed=2)
    store = HistoryStore(SHAPE)
    store.extend([bare, known])
    kept = store.to_trace()
    assert kept.tokens.tolist() == [-1, -1, -1, *known.tokens.tolist()]
    assert kept.phase.tolist() == [0, 0, 0, *known.phase.tolist()]
    assert np.array_equal(kept.embeddings, [np.zeros(6), known.embeddings[0]])
    store.check_integrity()
    alone = HistoryStore(SHAPE)
    alone.add(bare)
    assert alone.to_trace().tokens is None and alone.to_trace().embeddings is None


def test_a_request_without_meaning_does_not_hide_that_of_the_others():
    store = HistoryStore(SHAPE)
    axes = np.eye(6)
    store.extend([request(axes[0]), request(axes[1]), replace(request(), embeddings=None)])
    assert [past.number for past in store.nearest(axes[1], 3)] == [1, 0, 2]


def test_embeddings_of_another_width_are_refused_and_never_compared():
    store = HistoryStore(SHAPE)
    store.extend([replace(request(), embeddings=None), request(np.eye(6)[0]), request(np.eye(6)[1])])
    with pytest.raises(ValueError, match=r"embeddings: the request's has 3 numbers, those of the history 6"):
        store.add(replace(request(), embeddings=np.ones((1, 3), np.float16)))
    assert store.num_requests == 3
    assert [past.number for past in store.nearest(np.ones(3), 2)] == [2, 1]
