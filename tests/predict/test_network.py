import numpy as np
import pytest

from vllm_moe_offload.predict.network import (
    Adam,
    NetworkInput,
    NetworkSize,
    Parameters,
    encode_context,
    encode_maps,
    forward_backward,
    known_layers,
    sigmoid,
)

SIZE = NetworkSize(layers=4, experts=6, vector=3, state=5, hidden=7)


def inputs(rows=5, seed=0):
    rng = np.random.default_rng(seed)
    experts = rng.random((rows, 4, 6)).argsort(axis=2)[:, :, :2]
    maps = encode_maps(experts, rng.random((rows, 4, 2)).astype(np.float32) + 0.1, 6)
    other = encode_maps(experts[::-1], rng.random((rows, 4, 2)).astype(np.float32) + 0.1, 6)
    frequency = rng.random((4, rows, 6)).astype(np.float32)
    return NetworkInput(
        rng.standard_normal((rows, 6), np.float32), encode_context(other, np.roll(other, 1, axis=1), frequency), maps
    )


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
def test_the_gradient_is_the_slope_of_the_loss(distance):
    """Central differences, along random directions through every parameter and the vectors."""
    given, gradient = inputs(), Parameters(SIZE)
    parameters = Parameters.random(SIZE, np.random.default_rng(1))
    outputs = 4 * 6
    _, vector_slope = forward_backward(parameters, given, distance, gradient)
    rng = np.random.default_rng(2)
    scratch = Parameters(SIZE)
    for name, view in parameters.views.items():
        direction = rng.standard_normal(view.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        original, losses = view.copy(), []
        for sign in (1, -1):
            view[...] = original + sign * np.float32(0.02) * direction
            losses.append(forward_backward(parameters, given, distance, scratch)[0])
        view[...] = original
        slope = (losses[0] - losses[1]) / 0.04 * outputs
        assert slope == pytest.approx(float((gradient.views[name] * direction).sum()), abs=0.02), name
    direction = rng.standard_normal(given.vectors.shape).astype(np.float32)
    moved = [given._replace(vectors=given.vectors + step * direction) for step in (np.float32(0.02), np.float32(-0.02))]
    losses = [forward_backward(parameters, each, distance, scratch)[0] for each in moved]
    assert (losses[0] - losses[1]) / 0.04 * outputs == pytest.approx(float((vector_slope * direction).sum()), abs=0.05)


def test_maps_are_encoded_as_choice_and_weight():
    dense = encode_maps(np.array([[[4, 1]], [[0, 2]]]), np.array([[[0.75, 0.25]], [[0.0, 0.0]]], np.float32), 6)
    assert dense.shape == (1, 2, 12)
    assert dense[0, 0].tolist() == [0, 1, 0, 0, 1, 0, 0, 0.5, 0, 0, 1.5, 0]
    assert not dense[0, 1].any()


def test_what_a_distance_has_seen():
    assert known_layers(5, 0).tolist() == [0, 0, 0, 0, 0]
    assert known_layers(5, 1).tolist() == [0, 1, 2, 3, 4]
    assert known_layers(5, 3).tolist() == [0, 0, 0, 1, 2]


def test_sigmoid_does_not_overflow():
    values = sigmoid(np.array([-1e9, 0, 1e9], np.float32))
    assert values[0] < 1e-9 and values[1] == 0.5 and values[2] == 1


def test_parameters_of_another_size_are_refused():
    with pytest.raises(ValueError, match="parameters"):
        Parameters(SIZE, np.zeros(7, np.float32))


def test_adam_finds_the_bottom_of_a_bowl():
    position, goal = np.zeros(100_000, np.float32), np.linspace(-1, 1, 100_000, dtype=np.float32)
    adam = Adam(len(position))
    for _ in range(300):
        adam.update(position, 2 * (position - goal), 0.02)
    assert np.abs(position - goal).max() < 0.01
