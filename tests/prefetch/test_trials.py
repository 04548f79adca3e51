"""Predicting can lose no more than its allowance, and is not kept from gaining."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.prefetch.trials import Trials


def serve(trials: Trials, rows: int, alone: float, predicted: float, thinking: float, stalled: float) -> tuple:
    """One step that takes so many seconds left alone or predicted: seconds it took, and whether it was predicted."""
    predicts = trials.begin_step(rows)
    seconds = predicted if predicts else alone
    trials.end_step(rows, seconds, stalled, thinking if predicts else None)
    return seconds, predicts


@settings(max_examples=60, deadline=None)
@given(
    alone=st.floats(1e-4, 10),
    thinking=st.floats(0, 3),
    slower=st.floats(-0.5, 1.5),
    more_per_row=st.floats(0, 1),
    batches=st.lists(st.integers(1, 32), min_size=1, max_size=5),
)
def test_in_the_long_run_it_loses_at_most_two_percent(alone, thinking, slower, more_per_row, batches):
    """Whatever thinking takes and whatever it does to the rest of the step, both in units of a step left alone."""
    trials, took, without, steps = Trials(), 0.0, 0.0, 4000
    for step in range(steps):
        rows = batches[step * len(batches) // steps]
        usual = alone * (1 + more_per_row * rows.bit_length())
        predicted = usual * (1 + thinking + slower)
        took += serve(trials, rows, usual, predicted, usual * thinking, stalled=usual)[0]
        without += usual
    assert took <= 1.02 * without
    if thinking + slower < -0.05:
        assert took < without


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6])
@pytest.mark.parametrize(("thinking", "slower"), [(0.02, 0.0), (0.05, 0.0), (0.2, 0.1), (1.5, 0.0), (0.05, 0.1)])
def test_steps_of_changing_length_do_not_deceive_it(noise, thinking, slower):
    draw = np.random.default_rng(0)
    took = without = 0.0
    for _ in range(5):
        trials = Trials()
        for alone in draw.gamma(noise**-2, noise**2, 4000):
            predicted = alone * (1 + slower) + thinking
            took += serve(trials, 1, alone, predicted, thinking, stalled=alone)[0]
            without += alone
    assert took <= 1.02 * without


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_where_it_gains_it_predicts_nearly_always(noise):
    draw, trials, predicted = np.random.default_rng(1), Trials(), 0
    for alone in draw.gamma(noise**-2, noise**2, 2000):
        predicted += serve(trials, 4, alone, 0.8 * alone, 0.05, stalled=0.3)[1]
    assert predicted > 0.8 * 2000


def test_where_nothing_stalls_it_tries_no_second_time():
    trials = Trials()
    predicted = [serve(trials, 1, 1.0, 1.1, 0.1, stalled=0.0)[1] for _ in range(5000)]
    assert any(predicted[:20]) and not any(predicted[40:])
    late = [serve(trials, 1, 1.0, 0.7, 0.1, stalled=0.4)[1] for _ in range(500)]
    assert sum(late) > 200, "until something stalls"


def test_a_hiccup_while_it_gains_is_forgiven():
    trials = Trials()
    for _ in range(300):
        serve(trials, 1, 1.0, 0.7, 0.05, stalled=0.5)
    serve(trials, 1, 50.0, 50.0, 0.05, stalled=0.5)
    assert sum(serve(trials, 1, 1.0, 0.7, 0.05, stalled=0.5)[1] for _ in range(200)) > 120
