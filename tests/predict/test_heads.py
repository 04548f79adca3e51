import numpy as np
import pytest

from vllm_moe_offload.predict.base import ModelShape, RequestState, TokenMap, TokenMemory
from vllm_moe_offload.predict.baselines import FrequencyPredictor
from vllm_moe_offload.predict.heads import HeadsPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors, ModelVectors
from vllm_moe_offload.predict.trainer import HeadsTrainer, Samples
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.forecast import forecast
from vllm_moe_offload.trace.trace import PREFILL

SHAPE = ModelShape(24, 32, 4)


def trained(trace, num_steps=60):
    vectors = LearnedVectors(16)
    parameters = Parameters.random(NetworkSize(24, 32, 16, 64, 48), np.random.default_rng(0))
    trainer = HeadsTrainer(parameters, vectors, trace, num_steps)
    while not trainer.finished:
        trainer.step()
    return trainer


@pytest.fixture(scope="module")
def trainer(past):
    return trained(past)


@pytest.fixture(scope="module")
def heads(trainer):
    return HeadsPredictor(SHAPE, trainer.parameters, trainer.vectors)


def test_five_short_requests_teach_more_than_counting(past, unseen, heads):
    frequency = FrequencyPredictor(SHAPE)
    frequency.fit(past)
    scores = []
    for predictor in (frequency, heads):
        accuracy = Accuracy(24, 4, (0, 2))
        forecast(predictor, unseen, (), accuracy)
        scores.append(accuracy.recall(2, 4)[6:].mean())
    assert scores[1] > scores[0] + 0.1


def test_training_is_deterministic(past):
    first, second = trained(past, 8), trained(past, 8)
    assert np.array_equal(first.parameters.flat, second.parameters.flat)
    assert np.array_equal(first.vectors.rows, second.vectors.rows)


def test_training_sees_exactly_what_a_running_step_sees(past, trainer):
    """The rows of ``Samples`` and the contexts of ``RequestState`` are two ways to the same hidden units."""
    samples, memory = Samples(past), TokenMemory()
    rows = []
    for request in past.requests():
        state = RequestState(SHAPE, None, memory)
        for token, experts, weights in zip(request.tokens, request.experts, request.weights, strict=True):
            rows.append(state.context(int(token)))
            state.advance(int(token), TokenMap(experts, weights))
    picked = np.array([0, 1, 40, 109, 110, 200, past.num_tokens - 1])
    context = samples.context(picked, np.zeros(len(picked), bool))

    def difference(frequency_counts):
        parameters = Parameters(trainer.parameters.size, trainer.parameters.flat.copy())
        parameters.views["C"][:, -32:] *= frequency_counts
        predictor = HeadsPredictor(SHAPE, parameters, trainer.vectors)
        known = predictor.known_before([rows[i] for i in picked])
        stepping = [predictor.weights.hidden_before(layer, known) for layer in range(24)]
        return np.abs(context @ parameters.views["C"] + parameters.views["b"] - np.stack(stepping))

    assert difference(0).max() < 1e-4
    # Frequencies are summed over a window in training: what lies before it weighs less than an eighth.
    assert difference(1)[:, :3].max() < 1e-3
    assert difference(1).max() < 1


def test_rows_do_not_see_each_other(past, heads):
    request = past.request(0)
    state = heads.start_request()
    rows = state.contexts_side_by_side(request.tokens[:5])

    def probabilities(picked):
        step = heads.begin([rows[i] for i in picked])
        for layer in range(6):
            step.observe(layer, request.experts[picked, layer].astype(np.int64), request.weights[picked, layer])
        return step.predict(8)

    together = probabilities([0, 1, 2, 3, 4])
    alone = np.concatenate([probabilities([i]) for i in range(5)])
    assert together.shape == (5, 32) and (together >= 0).all() and (together <= 1).all()
    assert np.allclose(together, alone, atol=1e-4)


def test_predictions_before_an_observation_stay_as_they_were(past, heads):
    request = past.request(1)
    step = heads.begin([heads.start_request().context(int(request.tokens[0]))])
    before = step.predict(2)
    copy = before.copy()
    step.observe(0, request.experts[:1, 0].astype(np.int64), request.weights[:1, 0])
    assert np.array_equal(before, copy) and not np.array_equal(step.predict(2), copy)


def test_prefill_rows_do_not_know_the_map_before_them(past):
    state = RequestState(SHAPE, None, TokenMemory())
    state.advance(7, TokenMap(past.experts[0].astype(np.int64), past.weights[0].astype(np.float32)))
    rows = state.contexts_side_by_side(np.array([3, 4, 5]))
    assert [row.previous for row in rows] == [None] * 3
    assert [row.previous_token for row in rows] == [7, 3, 4]
    assert PREFILL == 1


def test_training_takes_the_steps_it_was_given_one_at_a_time(past):
    parameters = Parameters.random(NetworkSize(24, 32, 16, 8, 8), np.random.default_rng(0))
    trainer = HeadsTrainer(parameters, LearnedVectors(16), past, 9)
    for _ in range(9):
        assert not trainer.finished
        trainer.step()
    assert trainer.finished


def test_a_models_own_vectors_know_every_token():
    table = np.random.default_rng(0).standard_normal((100, 12))
    vectors = ModelVectors(lambda tokens: table[tokens], 12)
    looked_up = vectors.look_up(np.array([5, -1, 99]))
    assert np.allclose(np.linalg.norm(looked_up, axis=1), [12**0.5, 0, 12**0.5], atol=1e-3)
    assert looked_up[0] @ table[5] == pytest.approx(12**0.5 * np.linalg.norm(table[5]), rel=1e-4)


def test_learned_vectors_move_only_where_the_slope_is():
    vectors = LearnedVectors(4)
    vectors.grow(np.array([3, 9, -1, 9]))
    before = vectors.look_up(np.array([3, 9, 1000, -1]))
    assert not before[2:].any()
    vectors.learn(np.array([9, 9, -1]), np.ones((3, 4), np.float32), 0.1)
    after = vectors.look_up(np.array([3, 9, 1000, -1]))
    assert np.array_equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert (after[1] < before[1]).all()


def test_the_memory_of_tokens_is_bounded_and_keeps_the_latest():
    memory = TokenMemory(capacity=2)
    maps = [TokenMap(np.full((1, 1), i), np.ones((1, 1))) for i in range(4)]
    for token, token_map in zip((1, 2, 1, 3), maps, strict=True):
        memory.remember(token, token_map)
    memory.remember(-1, maps[0])
    assert memory.recall(1) is maps[2] and memory.recall(3) is maps[3]
    assert memory.recall(2) is None and memory.recall(-1) is None
