"""Replays of models of any shape, with whatever their recorder did not know."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_traces import random_trace

from vllm_moe_offload.predict.registry import REPLAY_PREDICTORS
from vllm_moe_offload.replay.bounds import perfect_forecast
from vllm_moe_offload.replay.hardware import ModelProfile, hardware_profile
from vllm_moe_offload.replay.report import DISTANCES, Setup, replay, run_once


@st.composite
def replays(draw):
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 10))
    top_k = draw(st.integers(1, experts))
    lengths = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    trace = random_trace(
        layers,
        experts,
        top_k,
        lengths,
        seed=draw(st.integers(0, 9)),
        tokens=draw(st.booleans()),
        width=draw(st.sampled_from((0, 4))),
        prefill=draw(st.integers(0, 3)),
    )
    setup = Setup(
        slots=draw(st.integers(max(experts, layers * top_k), layers * experts)),
        predictor=draw(st.sampled_from(REPLAY_PREDICTORS)),
        batch=draw(st.integers(1, 3)),
        threshold=draw(st.sampled_from((0.0, 0.3, 1.0))),
        hardware=hardware_profile("l4-pcie4"),
        model=ModelProfile(1 << 20, 1 << 20, 1 << 19),
    )
    return trace, setup


@settings(max_examples=25, deadline=None)
@given(replays())
def test_a_report_is_sane_whatever_the_model(case):
    trace, setup = case
    report = replay(trace, setup)
    json.dumps(report, allow_nan=False)
    books = report["prefetch"]
    assert 0 < report["accesses"] <= trace.experts.size
    assert 0 <= report["demand_miss_rate"] <= min(1, report["loads_per_use"])
    loads = round(report["loads_per_use"] * report["accesses"])
    misses = round(report["demand_miss_rate"] * report["accesses"])
    assert sum(books.values()) == loads - misses + books["late"]
    assert 0 <= report["belady_miss_rate"] <= report["no_prefetch"]["demand_miss_rate"] <= 1
    for by_count in report["recall"].values():
        for value in by_count.values():
            assert len(value["layers"]) == trace.num_layers and all(0 <= share <= 1 for share in value["layers"])
    assert report["tpot_seconds"] >= report["stall_seconds_per_token"] >= 0


def test_a_quarter_of_few_layers_leaves_room_for_speculative_loads():
    """Eight layers of 64 experts, as in the bundled model: two whole layers fit, and speculative loads find a place."""
    trace = random_trace(8, 64, 4, lengths=(30,))
    tally = run_once(trace, Setup(slots=128), perfect_forecast(trace, DISTANCES), 0.5)
    assert tally.demand_miss_rate < 0.2 and tally.useful > 0


@pytest.mark.parametrize("predictor", REPLAY_PREDICTORS)
def test_one_token_without_a_history_can_be_replayed(predictor):
    report = replay(random_trace(3, 8, 2, lengths=(1,), tokens=False, width=0), Setup(slots=12, predictor=predictor))
    assert report["demand_miss_rate"] == 1 and report["accesses"] == 6
