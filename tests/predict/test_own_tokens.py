"""What a running request's own tokens are worth as neighbours, and when heads take over from them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.predict.base import ModelShape, TokenMap
from vllm_moe_offload.predict.calibration import share_calibration
from vllm_moe_offload.predict.finemoe import FineMoEPredictor
from vllm_moe_offload.predict.heads import HeadsPredictor
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.neighbours import Calibrations, Candidates, NeighboursPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.forecast import forecast
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import Trace

SHAPE = ModelShape(24, 32, 4)
SMALL = ModelShape(3, 8, 2)


class LateHistory(HistoryStore):
    """Answers when told to, as a history elsewhere does."""

    def seek(self, embedding, count, found):
        found([])
        self.answer = lambda: found(self.nearest(embedding, count))


def filled(trace, kind=HistoryStore) -> HistoryStore:
    store = kind(SHAPE)
    store.extend(trace.requests())
    return store


def token_maps(trace):
    return [TokenMap(*one) for one in zip(trace.experts, trace.weights, strict=True)]


def run(predictor, trace, state):
    """Let ``trace`` pass as a request of one token per step."""
    for token, token_map in zip(trace.tokens.tolist(), token_maps(trace), strict=True):
        predictor.begin([state.context(token)])
        state.advance(token, token_map)
        predictor.learn(state, token, token_map)


def passed(predictor, state, trace, row, layers):
    """A step of one token that has been through ``layers`` layers as row ``row`` of ``trace`` was."""
    step = predictor.begin([state.context(int(trace.tokens[row]))])
    for layer in range(layers):
        step.observe(layer, trace.experts[row : row + 1, layer].astype(np.int64), trace.weights[row : row + 1, layer])
    return step


def random_trace(tokens, rng) -> Trace:
    """One request of SMALL, all weights alike."""
    experts = rng.random((tokens, 3, 8)).argsort(axis=2)[:, :, :2].astype(np.uint8)
    return Trace(experts, np.full((tokens, 3, 2), 0.5, np.float16), np.array([0, tokens], np.int64), 8)


def recall(predictor, trace):
    accuracy = Accuracy(24, 4, (2,))
    forecast(predictor, trace, (), accuracy)
    return [accuracy.recall(2, count)[6:].mean() for count in (4, 8)]


def test_from_nothing_neighbours_find_at_least_what_finemoe_finds(example):
    cold = example.select([0, 5])
    ours = recall(NeighboursPredictor(SHAPE, HistoryStore(SHAPE)), cold)
    theirs = recall(FineMoEPredictor(SHAPE), cold)
    assert ours[0] >= theirs[0] and ours[1] >= theirs[1] + 0.05


def test_own_tokens_help_beside_a_history(past, unseen):
    predictor = NeighboursPredictor(SHAPE, filled(past))
    forgetful = NeighboursPredictor(SHAPE, filled(past), max_candidates=3)
    assert recall(predictor, unseen)[0] > recall(forgetful, unseen)[0] + 0.1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 7), st.integers(0, 4), st.integers(0, 9))
def test_the_latest_tokens_are_candidates_however_they_came(bursts, room, others, seed):
    rng = np.random.default_rng(seed)
    maps = token_maps(random_trace(sum(bursts), rng))
    candidates = Candidates(SMALL, [(random_trace(others, rng), others)] if others else [], room)
    added = 0
    for burst in bursts:
        for _ in range(burst):
            candidates.add(added, maps[added])
            added += 1
        assert candidates.count() == others + min(added, room)
    count = candidates.count()
    assert sorted(candidates.tokens[others:count].tolist()) == list(range(max(0, added - room), added))
    for layer in range(3):
        columns = candidates.columns(layer)
        assert ((columns[:, :count] > 0).sum(axis=0) == 2).all()
        for place in range(others, count):
            chosen = maps[candidates.tokens[place]].experts[layer]
            assert np.allclose(columns[chosen, place], np.sqrt(0.5))


def test_a_history_that_answers_late_does_not_cost_the_own_tokens(past, unseen):
    history = filled(past, LateHistory)
    predictor = NeighboursPredictor(SHAPE, history)
    state = predictor.start_request()
    run(predictor, unseen, state)
    history.answer()
    step = passed(predictor, state, unseen, 50, 10)
    assert set(np.argsort(-step.predict(12)[0])[:4]) == set(unseen.experts[50, 12].tolist())
    assert state.predictor_state.count() == past.num_tokens + unseen.num_tokens


@pytest.fixture
def heads():
    vectors = LearnedVectors()
    return HeadsPredictor(
        SHAPE, Parameters.random(NetworkSize(24, 32, vectors.width), np.random.default_rng(0)), vectors
    )


def test_young_heads_predict_from_the_start_and_neighbours_afterwards(past, unseen, heads):
    predictor = HistoryPredictor(SHAPE, filled(past))
    state = predictor.start_request()
    neighbours = passed(predictor, state, unseen, 3, 5).predict(7)
    predictor.use_heads(heads, 600)
    rows = [state.context(int(unseen.tokens[3]))]
    assert np.array_equal(predictor.begin(rows).predict(1), heads.begin(rows).predict(1))
    assert np.array_equal(passed(predictor, state, unseen, 3, 5).predict(7), neighbours)
    many = [predictor.start_request().context() for _ in range(5)]
    assert type(predictor.begin(many)) is type(heads.begin(many))


def test_heads_that_know_enough_predict_alone_and_for_good(past, unseen, heads):
    predictor = HistoryPredictor(SHAPE, filled(past))
    before = predictor.start_request()
    predictor.use_heads(heads, 100_000)
    for state in (before, predictor.start_request()):
        run(predictor, unseen, state)
        assert type(predictor.begin([state.context()])) is type(heads.begin([state.context()]))
    predictor.use_heads(heads, 600)
    assert not predictor.learns_from_each_token


def test_what_neighbours_say_is_how_often_it_comes_true(past, example):
    """Even where the first guess is wrong: some requests put it right."""
    predictor = NeighboursPredictor(SHAPE, filled(past))
    predictor.calibrations = Calibrations(*(share_calibration([0, 1], [0.5, 0.5]) for _ in range(2)))
    first, later = (calibration_errors(predictor, example.select(requests)) for requests in ([1], [5, 7, 9]))
    assert min(first) > 0.02
    assert max(later) < 0.02


def calibration_errors(predictor, trace):
    accuracy = Accuracy(24, 4, (0, 2))
    forecast(predictor, trace, (), accuracy)
    return [accuracy.calibration_error(distance) for distance in (0, 2)]
