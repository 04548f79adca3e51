"""The gate predictor: routers asked early, and probabilities that come to mean what they say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.calibration import margin_calibration
from vllm_moe_offload.predict.gate import SCORINGS, GatePredictor, Router

SHAPE = ModelShape(4, 16, 3)
HIDDEN = 12


def predictor() -> GatePredictor:
    matrices = np.random.default_rng(0).standard_normal((SHAPE.layers, SHAPE.experts, HIDDEN)).astype(np.float32)
    return GatePredictor(SHAPE, [Router(lambda hidden, matrix=matrix: hidden @ matrix.T) for matrix in matrices])


def chosen_by(router: Router, hidden: np.ndarray) -> np.ndarray:
    return np.argsort(-router.logits(hidden), axis=1)[:, : SHAPE.top_k]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(SCORINGS),
    st.booleans(),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    st.integers(1, 4),
)
def test_margins_are_above_zero_for_what_is_chosen(
    seed: int, scoring: str, biased: bool, groups: tuple[int, int], top_k: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.standard_normal((5, 16)).astype(np.float32)
    bias = random.standard_normal(16).astype(np.float32) if biased else None
    router = Router(lambda hidden: hidden, scoring, bias, *groups)
    scores = {
        "softmax": np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
        "sigmoid": 1 / (1 + np.exp(-logits)),
        "sqrtsoftplus": np.sqrt(np.log1p(np.exp(logits))),
    }[scoring]
    scores = scores if bias is None else scores + bias
    grouped = scores.reshape(5, groups[0], -1)
    standing = grouped.max(axis=2) if bias is None else np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    shut = np.argsort(-standing, axis=1)[:, groups[1] :]
    for row in range(5):
        grouped[row, shut[row]] = -np.inf
    expected = np.argsort(-grouped.reshape(5, 16), axis=1)[:, :top_k]
    margins = router.margins(logits, top_k)
    for row in range(5):
        assert set(np.flatnonzero(margins[row] > 0)) == set(expected[row])


def test_before_the_first_layer_every_expert_is_alike() -> None:
    made = predictor()
    assert np.allclose(made.begin([made.start_request().context()]).predict(2), SHAPE.top_k / SHAPE.experts)


def test_the_layers_ahead_are_asked_with_what_this_layers_router_reads() -> None:
    made = predictor()
    hidden = np.random.default_rng(1).standard_normal((6, HIDDEN)).astype(np.float32)
    step = made.begin([made.start_request().context()] * 4)
    made.note_router_input(lambda: hidden)
    chosen = chosen_by(made.routers[0], hidden)[:4]
    step.observe(0, chosen, np.full(chosen.shape, 1 / 3))
    ranked = np.argsort(-step.predict(2), axis=1)[:, : SHAPE.top_k]
    expected = chosen_by(made.routers[2], hidden)[:4]
    assert [set(row) for row in ranked] == [set(row) for row in expected], "rows beyond those of the step are padding"


def test_a_gate_that_is_shown_nothing_says_so() -> None:
    made = predictor()
    step = made.begin([made.start_request().context()])
    with pytest.raises(ValueError, match="not given"):
        step.observe(0, np.array([[0, 1, 2]]), np.full((1, 3), 1 / 3))


def test_what_is_read_is_read_only_where_a_step_is_predicted() -> None:
    made = predictor()
    for layer in range(SHAPE.layers):
        made.note_router_input(lambda layer=layer: pytest.fail(f"layer {layer} was read"))


@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0, 10.0])
def test_probabilities_come_to_mean_what_they_say(drift: float) -> None:
    """``drift``: how far what the routers read moves from layer to layer."""
    made = predictor()
    random = np.random.default_rng(2)
    said, true = [], []
    for number in range(500):
        hidden = random.standard_normal((2, HIDDEN)).astype(np.float32)
        step = made.begin([made.start_request().context()] * 2)
        probabilities = np.empty(0)
        for layer in range(SHAPE.layers):
            chosen = chosen_by(made.routers[layer], hidden)
            if layer and number >= 200:
                said.append(probabilities)
                true.append(np.zeros((2, SHAPE.experts), bool))
                np.put_along_axis(true[-1], chosen, True, axis=1)
            made.note_router_input(lambda hidden=hidden: hidden)
            step.observe(layer, chosen, np.full(chosen.shape, 1 / 3))
            if layer + 1 < SHAPE.layers:
                probabilities = step.predict(layer + 1)
            hidden = hidden + drift * random.standard_normal(hidden.shape).astype(np.float32)
    p, used = np.concatenate(said).ravel(), np.concatenate(true).ravel()
    bins = np.minimum((p * 20).astype(int), 19)
    error = sum(abs(p[bins == b].sum() - used[bins == b].sum()) for b in range(20)) / len(p)
    assert error < 0.02
    assert p[used].mean() > p[~used].mean()


def test_calibration_forgets_what_has_changed() -> None:
    calibration = margin_calibration()
    random = np.random.default_rng(3)
    for line in (1, -1):
        for _ in range(4000):
            margins = random.standard_normal((2, 16))
            calibration.learn(margins, margins > line)
        assert (calibration.probabilities(np.array([line - 0.5, line + 0.5])) > 0.5).tolist() == [False, True]
