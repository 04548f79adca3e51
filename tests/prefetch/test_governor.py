"""Whether to predict: cases with exact lengths. ``tests/benchmarks/test_policy.py`` simulates adversarial ones."""

import pytest

from vllm_moe_offload.prefetch.governor import PredictionGovernor, kind_of
from vllm_moe_offload.prefetch.planner import Phase


def serve(
    governor: PredictionGovernor,
    steps: int,
    alone: float = 1.0,
    predicted: float = 0.8,
    predictor_seconds: float = 0.02,
    stalled: float = 0.5,
    kind: int = 0,
) -> int:
    """Steps that take so many seconds left alone or predicted. How many were predicted."""
    count = 0
    for _ in range(steps):
        predicts = governor.begin_step(kind)
        count += predicts
        governor.end_step(predicted if predicts else alone, stalled, predictor_seconds if predicts else None)
    return count


def test_it_predicts_from_the_thirteenth_step_on() -> None:
    """A short service gains, too."""
    governor = PredictionGovernor()
    assert serve(governor, 12) == 0
    assert serve(governor, 40) == 40


def test_where_it_gains_nearly_all_steps_are_predicted() -> None:
    assert serve(PredictionGovernor(), 10_000) > 0.84 * 10_000


def test_where_it_loses_only_trials_are_left() -> None:
    governor = PredictionGovernor()
    assert 0 < serve(governor, 20_000, predicted=1.1) < 0.04 * 20_000


def test_a_predictor_that_is_far_too_slow_is_stopped_within_a_few_steps() -> None:
    governor = PredictionGovernor()
    assert serve(governor, 1000, predicted=20.0, predictor_seconds=19.0) == 2


def test_where_nothing_stalls_prediction_is_known_to_lose_however_noisy_steps_are() -> None:
    """No gain can come from steps that happened to be short."""
    governor, lucky = PredictionGovernor(), 0
    for step in range(20_000):
        predicts = governor.begin_step(0)
        lucky += predicts
        governor.end_step(0.7 if predicts else (1.4, 0.6)[step % 2], 0.0, 0.02 if predicts else None)
    assert lucky < 0.06 * 20_000


@pytest.mark.parametrize("pause", [0.03, 0.1, 1.0, 60.0])
@pytest.mark.parametrize("place", ["predictor_seconds", "predicted step", "step left alone"])
def test_one_pause_changes_nothing(pause: float, place: str) -> None:
    """Wherever the whole process is held up, once: within predicting, elsewhere in a predicted step, or in another."""
    counts = []
    for paused in (False, True):
        governor, count = PredictionGovernor(), 0
        for step in range(30_000):
            predicts = governor.begin_step(0)
            count += predicts
            held = pause if paused and step >= 3000 and predicts == (place != "step left alone") else 0.0
            paused &= not held
            seconds, predictor_seconds = 0.0171 if predicts else 0.02, 0.0005 if predicts else 0.0
            predictor_seconds += held if place == "predictor_seconds" else 0.0
            governor.end_step(seconds + held, 0.0063, predictor_seconds if predicts else None)
        counts.append(count)
    assert counts[0] > 0.8 * 30_000 and abs(counts[1] - counts[0]) < 0.02 * 30_000


def test_gains_are_remembered_up_to_a_bound() -> None:
    """What was gained in a hundred thousand steps buys no more loss than what was gained in a few thousand."""
    predicted = []
    for gaining in (5000, 100_000):
        governor = PredictionGovernor()
        serve(governor, gaining)
        predicted.append(serve(governor, 10_000, predicted=1.05))
    assert max(predicted) * 0.05 < 0.01 * 10_000
    assert abs(predicted[0] - predicted[1]) < 700, "a run more or less"


def test_what_is_paid_later_is_charged_to_the_steps_that_caused_it() -> None:
    """Predicted steps are shorter, by less than what the steps after them are longer."""
    governor, owed, count = PredictionGovernor(), 0.0, 0
    for _ in range(20_000):
        predicts = governor.begin_step(0)
        count += predicts
        paid, owed = owed / 10, owed * 0.9 + (0.2 if predicts else 0.0)
        governor.end_step((0.95 if predicts else 1.0) + paid, 0.5, 0.02 if predicts else None)
    assert count < 0.05 * 20_000


def test_a_trial_comes_within_4800_steps_and_two_that_gain_suffice() -> None:
    governor = PredictionGovernor()
    serve(governor, 20_000, predicted=1.3)
    silent = 0
    while not serve(governor, 1, predicted=0.8):
        silent += 1
    assert silent <= 4800
    serve(governor, 600, predicted=0.8)
    assert serve(governor, 2000, predicted=0.8) > 0.8 * 2000


def test_longer_steps_of_another_kind_are_no_loss() -> None:
    """A batch that grows from 1 to 8 rows makes steps longer, whether they are predicted or not."""
    governor = PredictionGovernor()
    one, eight = kind_of(Phase.DECODE, 1), kind_of(Phase.DECODE, 8)
    assert one != eight != kind_of(Phase.PREFILL, 8)
    count = 0
    for stretch in range(200):
        longer = stretch % 2
        count += serve(governor, 70, 1.0 + longer, 0.9 * (1.0 + longer), kind=eight if longer else one)
    assert count > 0.8 * 200 * 70


def test_a_step_that_never_ends_leaves_nothing_behind() -> None:
    """An exception may leave a step: the next begins all the same."""
    governor = PredictionGovernor()
    for _ in range(5000):
        governor.begin_step(0)
        serve(governor, 1)
    assert serve(governor, 1000) > 700
