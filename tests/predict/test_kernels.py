"""The compiled functions against the same in plain numpy."""

import llvmlite.binding
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.predict import kernels
from vllm_moe_offload.predict.network import encode_context, encode_maps

LAYERS, EXPERTS, TOP_K, WIDTH = 4, 7, 3, 5
SEEDS = st.integers(0, 2**32 - 1)
ROWS = st.integers(1, 4)


def draw(seed):
    rng = np.random.default_rng(seed)
    return rng, lambda *shape: rng.standard_normal(shape, np.float32)


def maps(rng, rows):
    """Experts ``[B, L, K]`` and their weights."""
    experts = rng.random((rows, LAYERS, EXPERTS)).argsort(axis=2)[:, :, :TOP_K].copy()
    weights = rng.random(experts.shape, np.float32)
    return experts, weights / weights.sum(axis=2, keepdims=True)


def by_expert(rows):
    """``[..., 2E, H]`` (presence, then weight) as ``[..., E, 2H]``."""
    return np.concatenate([rows[..., :EXPERTS, :], rows[..., EXPERTS:, :]], axis=-1)


@settings(deadline=None)
@given(SEEDS, ROWS)
def test_a_map_adds_the_rows_of_its_experts(seed, rows):
    rng, normal = draw(seed)
    experts, weights = maps(rng, rows)
    added, state = normal(2 * EXPERTS, WIDTH), normal(rows, WIDTH)
    expected = state + encode_maps(experts, weights, EXPERTS)[1] @ added
    kernels.add_map(*kernels.as_map(experts[:, 1], weights[:, 1]), by_expert(added), state)
    assert np.allclose(state, expected, atol=1e-5)


@settings(deadline=None)
@given(SEEDS, ROWS, st.integers(0, LAYERS - 1), st.booleans())
def test_what_is_known_before_is_what_training_encodes(seed, rows, layer, knows_same_token):
    rng, normal = draw(seed)
    previous, same = maps(rng, rows), maps(rng, rows)
    frequency = rng.random((rows, LAYERS, EXPERTS), np.float32) * rng.integers(0, 2, (rows, LAYERS, EXPERTS))
    weights, hidden = normal(9 * EXPERTS, WIDTH), normal(rows, WIDTH)
    encoded = encode_context(
        encode_maps(*previous, EXPERTS),
        encode_maps(same[0], same[1] * knows_same_token, EXPERTS),
        frequency.transpose(1, 0, 2),
    )
    expected = hidden + encoded[layer] @ weights
    known_same = same[0] if knows_same_token else np.full_like(same[0], -1)
    contexts = by_expert(weights[: 8 * EXPERTS].reshape(4, 2 * EXPERTS, WIDTH))
    kernels.add_context(
        layer,
        *previous,
        known_same,
        same[1],
        frequency.astype(np.float32),
        contexts,
        4 * weights[8 * EXPERTS :],
        hidden,
    )
    assert np.allclose(hidden, expected, atol=1e-4)


@settings(deadline=None)
@given(SEEDS, ROWS)
def test_a_head_answers_what_its_network_says(seed, rows):
    _, normal = draw(seed)
    state, context, bias = normal(rows, WIDTH), normal(rows, 6), normal(EXPERTS)
    inner, outer = normal(WIDTH, 6), 30 * normal(6, EXPERTS)
    answer = np.empty((rows, EXPERTS), np.float32)
    kernels.evaluate_head(state, context, inner.T.copy(), outer.T.copy(), bias, answer)
    outputs = (np.maximum(state @ inner + context, 0) @ outer + bias).astype(np.float64)
    assert np.allclose(answer, 1 / (1 + np.exp(-outputs.clip(-80, 80))), atol=1e-4)


@settings(deadline=None)
@given(SEEDS, ROWS, st.integers(1, 30))
def test_candidates_that_took_the_same_way_are_heard(seed, rows, candidates):
    rng, _ = draw(seed)
    theirs, their_weights = maps(rng, candidates)
    ours, our_weights = maps(rng, rows)
    columns = np.zeros((LAYERS, EXPERTS, candidates + 2), np.float32)
    for layer in range(LAYERS):
        columns[layer][theirs[:, layer].T, np.arange(candidates)] = np.sqrt(their_weights[:, layer].T)
    matches = np.zeros((rows, candidates), np.float32)
    for layer in range(2):
        roots = np.sqrt(our_weights[:, layer])
        kernels.follow(np.ascontiguousarray(ours[:, layer]), roots, columns[layer], np.float32(0.8), matches)

    def likeness(layer):
        mine = np.zeros((rows, EXPERTS))
        np.put_along_axis(mine, ours[:, layer], np.sqrt(our_weights[:, layer]), axis=1)
        return mine @ columns[layer][:, :candidates]

    assert np.allclose(matches, 0.8 * likeness(0) + likeness(1), atol=1e-5)

    shares, best = np.empty_like(matches), np.empty(rows, np.float32)
    kernels.weigh(matches, np.float32(5), best, shares)
    exact = np.exp(5 * matches.astype(float))
    assert np.allclose(shares, exact / exact.sum(axis=1, keepdims=True), atol=1e-4)
    assert np.array_equal(best, matches.max(axis=1))

    own, own_shares = rng.random((rows, EXPERTS), np.float32), rng.random(rows, np.float32)
    straight = (np.linspace(0, 1, 33) ** 2).astype(np.float32)
    said, bent = np.empty_like(own), np.empty_like(own)
    kernels.vote(shares, np.ascontiguousarray(theirs[:, 3]), own, own_shares, straight, said, bent)
    chose = np.zeros((candidates, EXPERTS))
    np.put_along_axis(chose, theirs[:, 3], 1, axis=1)
    assert np.allclose(said, own_shares[:, None] * own + (1 - own_shares[:, None]) * (shares @ chose), atol=1e-5)
    assert np.allclose(bent, said, atol=1e-3)


def test_what_is_said_stays_a_probability_where_rounding_leaves_the_unit_interval():
    own = np.array([[-1e-8, 1 + 1e-6, 0.5]], np.float32)
    curve, said, bent = np.linspace(0, 1, 33, dtype=np.float32), np.empty_like(own), np.empty_like(own)
    kernels.vote(np.zeros((1, 1), np.float32), np.array([[0]]), own, np.ones(1, np.float32), curve, said, bent)
    assert bent[0, :2].tolist() == pytest.approx([0, 1])


def test_vllm_can_look_through_every_object_of_every_module():
    """Its CPU worker does so when it starts; llvmlite's library would answer with a function (see ``kernels``)."""
    assert isinstance(vars(llvmlite.binding.ffi.lib), dict)


@pytest.mark.parametrize("stranger", [-1, EXPERTS])
def test_experts_that_do_not_exist_are_refused_and_not_read(stranger):
    experts, weights = np.array([[0, stranger]]), np.ones((1, 2), np.float32)
    with pytest.raises(IndexError, match="expert"):
        kernels.add_map(experts, weights, np.ones((EXPERTS, 2), np.float32), np.zeros((1, 1), np.float32))
    with pytest.raises(IndexError, match="expert"):
        columns = np.ones((EXPERTS, 3), np.float32)
        kernels.follow(experts, weights, columns, np.float32(1), np.zeros((1, 3), np.float32))
