import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.load_report import LoadReport
from vllm_moe_offload.prefetch.planner import Estimates, Outlook, Phase, Planner


def planner(load=1.0, layer=2.0, chunk=0.0, busy=0.5, demands=0.0) -> Planner:
    return Planner(Estimates(load, layer, chunk, busy, demands))


def outlook(probabilities, ahead=1, absent=None) -> Outlook:
    probabilities = np.array(probabilities, np.float32)
    return Outlook(ahead, probabilities, np.ones(len(probabilities), bool) if absent is None else np.array(absent))


def planned(which, probabilities, queue=0.0, **kwargs):
    return which.plan(Phase.DECODE, outlook(probabilities, **kwargs), queue).tolist()


def test_the_likely_come_first_and_what_is_resident_is_left_alone():
    assert planned(planner(layer=10), [0.2, 0.9, 0.0, 0.6]) == [1, 3]
    assert planned(planner(layer=10), [0.2, 0.9, 0.0, 0.6], absent=[True, False, True, True]) == [3]


def test_an_idle_link_takes_long_shots_and_a_busy_one_only_good_bets():
    chances = [0.9, 0.6, 0.4, 0.2, 0.05]
    idle, half, full = (planned(planner(layer=10, busy=busy), chances) for busy in (0.0, 0.5, 1.0))
    assert idle == [0, 1, 2, 3, 4]
    assert half == [0, 1, 2]
    assert full == [0, 1]


def test_what_would_arrive_too_late_to_save_anything_is_not_loaded():
    assert planned(planner(layer=2.0), [0.9] * 6) == [0, 1]
    assert planned(planner(layer=2.0), [0.9] * 6, queue=3.0) == []
    assert len(planned(planner(layer=2.0), [0.9] * 6, ahead=2)) > len(planned(planner(layer=2.0), [0.9] * 6, ahead=1))


def test_a_demand_that_must_wait_for_a_chunk_counts_against_a_guess():
    assert planned(planner(layer=10, busy=0, demands=4), [0.3]) == [0]
    assert planned(planner(layer=10, busy=0, demands=40, chunk=0.9), [0.3]) == []


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0.01, 5),
    st.floats(0.01, 5),
    st.floats(0, 1),
    st.floats(0, 10),
)
def test_only_absent_experts_each_once_in_falling_probability(chances, load, layer, busy, queue):
    absent = np.arange(len(chances)) % 3 != 0
    for phase in Phase:
        plan = planner(load, layer, busy=busy).plan(phase, outlook(chances, absent=absent), queue)
        assert len(set(plan.tolist())) == len(plan) and absent[plan].all()
        if phase is Phase.DECODE:
            given = np.array(chances, np.float32)[plan]
            assert (np.diff(given) <= 0).all() and (given > 0).all()


def test_a_prefill_that_uses_most_of_a_layer_streams_it_in_order():
    likely = [0.9, 0.2, 0.8, 0.6]
    which = planner(layer=0.1, busy=1.0)
    assert which.plan(Phase.PREFILL, outlook(likely, absent=[True, True, False, True]), 5.0).tolist() == [0, 1, 3]
    assert which.plan(Phase.DECODE, outlook(likely), 5.0).tolist() == []


def test_it_stops_when_guesses_are_wasted_tries_again_and_stays_when_they_pay():
    which = planner(layer=10)
    for _ in range(64 * 8):
        which.note(Phase.DECODE, LoadReport(wasted=1))
    assert which.is_off(Phase.DECODE) and not which.is_off(Phase.PREFILL)
    assert planned(which, [1.0]) == []
    silent = 0
    while which.is_off(Phase.DECODE):
        which.begin_step(Phase.DECODE)
        silent += 1
    assert 100 < silent < 10_000
    assert planned(which, [0.5]) == [] and planned(which, [0.99]) == [0]
    for _ in range(64 * 4):
        which.note(Phase.DECODE, LoadReport(useful=1))
    assert planned(which, [0.6]) == [0]


def test_late_arrivals_are_worth_what_they_spared():
    which = planner(layer=10)
    for _ in range(64 * 8):
        which.note(Phase.DECODE, LoadReport(late=1, late_seconds=0.1))
    assert not which.is_off(Phase.DECODE)


def test_estimates_follow_what_is_measured():
    estimates = Estimates(load_seconds=1.0, layer_seconds=1.0, chunk_seconds=0.1)
    for _ in range(200):
        estimates.note_load(3.0)
        estimates.note_layer(2.0, link_seconds=0.5, demands=2)
    assert abs(estimates.load_seconds - 3) < 0.01 and abs(estimates.layer_seconds - 2) < 0.01
    assert abs(estimates.busy - 0.25) < 0.01 and abs(estimates.demands_per_layer - 2) < 0.01
    estimates.note_layer(1.0, link_seconds=50.0, demands=0)
    assert estimates.busy <= 1


MACHINES = {
    "records of 11.8 MiB": Estimates(12e-3, 1.3e-3, 2e-3, busy=0.3, demands_per_layer=0.5),
    "small records, busy link": Estimates(0.1e-3, 0.5e-3, 0.1e-3, busy=0.7, demands_per_layer=2.0),
    "a link as slow as its layers": Estimates(1.1e-3, 1.3e-3, 1.1e-3, busy=0.3, demands_per_layer=0.5),
    "a saturated link": Estimates(1.1e-3, 1.3e-3, 1.1e-3, busy=0.7, demands_per_layer=2.0),
}


def lose(which: Planner, steps: int = 4000) -> list[int]:
    """Every prefetch of something certain is wasted, step after step. How many were admitted in each."""
    admitted = []
    for _ in range(steps):
        which.begin_step(Phase.DECODE)
        planned = which.plan(Phase.DECODE, outlook([1.0] * 8, ahead=2), 0.0)
        for _ in planned:
            which.note(Phase.DECODE, LoadReport(wasted=1))
        admitted.append(len(planned))
    return admitted


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_after_losses_it_tries_again_and_admits_again(machine: Estimates):
    """With chunks in the way of demands, as on every machine: no backoff may keep what is certain out for good."""
    which = Planner(dataclasses.replace(machine))
    before = len(which.plan(Phase.DECODE, outlook([1.0] * 8, ahead=2), 0.0))
    admitted = lose(which)
    longest = max(len(list(run)) for empty, run in itertools.groupby(admitted, key=lambda count: count == 0) if empty)
    assert before > 0 and 500 < longest <= 512 + 3 * 256
    for _ in range(512 + 3 * 256):
        which.begin_step(Phase.DECODE)
    assert len(which.plan(Phase.DECODE, outlook([1.0] * 8, ahead=2), 0.0)) == before


@settings(deadline=None)
@given(
    st.builds(Estimates, *[st.floats(1e-6, 10)] * 3, busy=st.floats(0, 1), demands_per_layer=st.floats(0, 40)),
    st.floats(0, 10),
    st.integers(1, 3),
    st.integers(0, 64 * 8),
)
def test_caution_never_forbids_what_speeds_allow(estimates: Estimates, queue: float, ahead: int, wasted: int):
    """What is nearly certain and would be admitted without any backoff is admitted with the most of it."""
    which, nearly = Planner(estimates), outlook([0.96], ahead=ahead)
    allowed = which.plan(Phase.DECODE, nearly, queue).tolist()
    for _ in range(wasted):
        which.note(Phase.DECODE, LoadReport(wasted=1))
    if not which.is_off(Phase.DECODE):
        assert which.plan(Phase.DECODE, nearly, queue).tolist() == allowed


def test_a_prefetch_that_was_waited_for_as_long_as_a_load_has_saved_nothing():
    which = planner(layer=10)
    for _ in range(32):
        which.note(Phase.DECODE, LoadReport(late=1, late_seconds=1.0))
        which.note(Phase.DECODE, LoadReport(wasted=1))
    assert planned(which, [0.45]) == [], "backoff has grown"
    which = planner(layer=10)
    for _ in range(32):
        which.note(Phase.DECODE, LoadReport(late=1, late_seconds=0.0))
        which.note(Phase.DECODE, LoadReport(wasted=1))
    assert planned(which, [0.45]) == [0]
