"""Routing that is drawn: like the trace it is drawn after, in what a cache sees of it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.plan.routing import correlations, drawn
from vllm_moe_offload.plan.statistics import (
    MOST_REQUESTS,
    bundled,
    routing_for,
    routing_of_trace,
    single_stream,
)
from vllm_moe_offload.replay.report import Setup, run_once
from vllm_moe_offload.trace.trace import names_each_once
from vllm_moe_offload.trace.trace_file import read_trace

TRACE = Path(__file__).parents[2] / "examples" / "traces" / "gpt-oss-20b-small.npz"


def test_a_drawn_trace_misses_as_the_recorded_one() -> None:
    recorded = read_trace(TRACE).without_repetitive()
    copy = drawn(correlations(recorded), recorded.shape, recorded.num_requests, 110)
    for share, room in ((0.25, 0.03), (0.5, 0.04)):
        slots = int(768 * share)
        real, other = (run_once(trace, Setup(slots), None, 1.0).demand_miss_rate for trace in (recorded, copy))
        assert other == pytest.approx(real, abs=room)


@given(
    st.integers(1, 4),
    st.integers(4, 40),
    st.integers(1, 4),
    st.lists(st.floats(0, 1), min_size=5, max_size=5).map(lambda row: sorted(row, reverse=True)),
)
@settings(max_examples=25, deadline=None)
def test_any_statistics_give_a_sound_trace(layers: int, experts: int, top_k: int, row: list[float]) -> None:
    trace = drawn(np.array([row]), (layers, experts, top_k), 2, 7)
    assert trace.shape == (layers, experts, top_k)
    assert trace.num_tokens == 14
    assert trace.experts.max() < experts
    assert names_each_once(trace.experts).all()
    found = correlations(trace)
    assert found.shape == (layers, 5)
    assert ((found >= 0) & (found <= 1)).all() and (np.diff(found, axis=1) <= 0).all()


def test_statistics_can_be_read_off_what_was_drawn_with_them() -> None:
    given_row = [0.8, 0.6, 0.5, 0.4, 0.2]
    trace = drawn(np.array([given_row] * 4), (4, 64, 8), 24, 60)
    found = correlations(trace).mean(axis=0)
    assert found == pytest.approx(given_row, abs=0.1)
    assert found[:2] == pytest.approx(given_row[:2], abs=0.04)


def test_bundled_statistics_are_what_their_trace_says() -> None:
    known = {statistics.model: statistics for statistics in bundled()}
    recorded = read_trace(TRACE).without_repetitive()
    found = known["openai/gpt-oss-20b"]
    assert (found.shape, found.tokens) == (recorded.shape, recorded.num_tokens)
    assert np.array(found.correlations) == pytest.approx(correlations(recorded), abs=1e-3)
    assert len(known["tiny-moe"].correlations) == 8


@pytest.mark.parametrize(
    ("shape", "model_type", "kind", "name"),
    [
        ((24, 32, 4), "gpt_oss", "same model", "openai/gpt-oss-20b"),
        ((8, 64, 4), "qwen3_moe", "same model", "tiny-moe"),
        ((36, 128, 4), "gpt_oss", "other model", "openai/gpt-oss-20b"),
        ((48, 128, 8), "qwen3_moe", "other model", "tiny-moe"),
        ((32, 8, 2), "mixtral", "other model", "openai/gpt-oss-20b"),
    ],
)
def test_the_nearest_model_is_named(shape: tuple[int, int, int], model_type: str, kind: str, name: str) -> None:
    trace, source = routing_for(shape, model_type, batch=12)
    assert (source.kind, source.name, trace.shape) == (kind, name, shape)
    assert trace.num_requests == 12
    assert name in source.words and ("another model" in source.words) == (kind == "other model")
    assert routing_for(shape, model_type, batch=1000)[0].num_requests == MOST_REQUESTS


def test_ones_own_trace() -> None:
    trace, source = routing_of_trace(TRACE, (24, 32, 4), batch=4)
    assert (source.kind, source.hit_rate_error) == ("trace", 0)
    assert trace.num_requests >= 4 and str(TRACE) in source.words
    assert 0 < single_stream(trace).num_requests <= trace.num_requests


def test_a_trace_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="24 MoE layers of 32 experts, top-4; this one has 48 MoE layers of 128"):
        routing_of_trace(TRACE, (48, 128, 8), batch=1)
    with pytest.raises(TraceError, match="too few for 40 at a time; record more, or lower --concurrency"):
        routing_of_trace(TRACE, (24, 32, 4), batch=40)
    with pytest.raises(TraceError, match="no such trace file"):
        routing_of_trace(tmp_path / "none.trace", (24, 32, 4), batch=1)
