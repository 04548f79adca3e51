import numpy as np
import pytest

from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.predict.base import ModelShape, TokenMap, union_probability
from vllm_moe_offload.predict.finemoe import FineMoEPredictor
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.moe_infinity import MoEInfinityPredictor
from vllm_moe_offload.predict.neighbours import NeighboursPredictor
from vllm_moe_offload.predict.registry import REPLAY_PREDICTORS, predictor_for_replay
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.forecast import forecast
from vllm_moe_offload.trace.history import HistoryStore

SHAPE = ModelShape(24, 32, 4)


def store_of(trace) -> HistoryStore:
    store = HistoryStore(SHAPE)
    store.extend(trace.requests())
    return store


def walk(predictor, request, row, layers):
    """A step of one row that has observed ``layers`` layers."""
    step = predictor.begin([predictor.start_request().context(int(request.tokens[row]))])
    for layer in range(layers):
        step.observe(
            layer, request.experts[row : row + 1, layer].astype(np.int64), request.weights[row : row + 1, layer]
        )
    return step


@pytest.mark.parametrize("name", [name for name in REPLAY_PREDICTORS if name != "history"])
def test_every_predictor_gives_probabilities_with_and_without_history(name, past, unseen):
    for history in (past, past.select([])):
        prediction = forecast(predictor_for_replay(name, SHAPE, store_of(history)), unseen, (1, 2)).probabilities
        assert prediction.shape == (unseen.num_tokens, 2, 24, 32)
        assert np.isfinite(prediction).all() and (prediction >= 0).all() and (prediction <= 1).all()


@pytest.mark.parametrize(("name", "better"), [("frequency", 0.35), ("coactivation", 0.35), ("neighbours", 0.5)])
def test_what_is_learned_from_other_requests_helps(name, better, past, unseen):
    accuracy = Accuracy(24, 4, (2,))
    forecast(predictor_for_replay(name, SHAPE, store_of(past)), unseen, (), accuracy)
    assert accuracy.recall(2, 4)[6:].mean() > better


@pytest.mark.parametrize("make", [FineMoEPredictor, None])
def test_a_trajectory_seen_before_is_recognised(make, past):
    predictor = NeighboursPredictor(SHAPE, store_of(past)) if make is None else make(SHAPE)
    if make is not None:
        predictor.fit(past)
    request = past.request(2)
    for row in (3, 50):
        predicted = walk(predictor, request, row, 10).predict(12)[0]
        assert set(np.argsort(-predicted)[:4]) == set(request.experts[row, 12].tolist())


def test_finemoe_replaces_the_most_redundant_map_and_keeps_the_rest(past):
    predictor = FineMoEPredictor(SHAPE, capacity=3)
    maps = [TokenMap(past.experts[i].astype(np.int64), past.weights[i].astype(np.float32)) for i in (0, 60, 300)]
    for token, token_map in enumerate(maps):
        predictor.insert(token, token_map)
    columns = predictor.columns.copy()
    predictor.insert(1, maps[1])
    assert np.array_equal(predictor.columns, columns)
    predictor.insert(9, maps[0])
    assert predictor.tokens.tolist() == [9, 1, 2] and predictor.filled == 3


def test_finemoe_searches_by_token_before_the_first_layer(past):
    predictor = FineMoEPredictor(SHAPE)
    predictor.fit(past)
    row = int(np.flatnonzero(predictor.tokens[: predictor.filled] == past.tokens[20])[0])
    step = predictor.begin([predictor.start_request().context(int(past.tokens[20]))])
    assert set(np.flatnonzero(step.predict(1)[0])) == set(past.experts[row, 1].tolist())
    unknown = predictor.begin([predictor.start_request().context(10**6)])
    assert not unknown.predict(1).any()


def test_moe_infinity_matches_the_nearest_past_request(past):
    predictor = MoEInfinityPredictor(SHAPE, capacity=4)
    predictor.fit(past)
    assert predictor.matrices.shape == (4, 24, 32)
    assert np.allclose(np.linalg.norm(predictor.matrices, axis=(1, 2)), 1, atol=1e-5)
    near, far = (walk(predictor, past.request(0), 5, 10).predict(layer)[0] for layer in (10, 23))
    assert near.sum() > far.sum() > 0


def test_union_is_the_probability_that_anyone_uses_it():
    merged = union_probability(np.array([[0.5, 0, 1], [0.5, 0, 0.3]], np.float32))
    assert merged.tolist() == [0.75, 0, 1]


def test_history_predicts_from_neighbours_until_the_heads_are_trained(past, unseen):
    predictor = HistoryPredictor(SHAPE, HistoryStore(SHAPE), learn_at_once=False)
    assert not predictor.training_due and predictor.heads is None
    neighbours = NeighboursPredictor(SHAPE, store_of(past))
    for request in past.requests():
        predictor.end_request(predictor.start_request(), request)
    assert predictor.training_due
    young = forecast(predictor, unseen, (2,)).probabilities
    assert np.allclose(young, forecast(neighbours, unseen, (2,)).probabilities, atol=1e-3)


def test_history_trains_on_all_it_holds_and_then_predicts_by_heads(past, monkeypatch):
    from vllm_moe_offload.predict import trainer

    monkeypatch.setattr(trainer, "_MIN_STEPS", 6)
    monkeypatch.setattr(trainer, "_EPOCHS", 0.1)
    predictor = HistoryPredictor(SHAPE, store_of(past))
    assert predictor.training_due and predictor.heads is None
    predictor.learn_all()
    assert predictor.heads is not None
    assert predictor.trained_tokens == past.num_tokens and not predictor.training_due


def test_unknown_names_are_refused_with_the_choices(past):
    with pytest.raises(ConfigError, match=r"'oracle' is unknown; choose one of history, .*none"):
        predictor_for_replay("oracle", SHAPE, store_of(past))
    with pytest.raises(ConfigError, match="hidden states"):
        predictor_for_replay("gate", SHAPE, store_of(past))
