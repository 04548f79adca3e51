"""Whatever way the engine schedules them, every request's trace is what its tokens were routed to, once each."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens
from vllm_moe_offload.trace.trace import PREFILL

SHAPE = (3, 300, 2)


def routing(request: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """``experts`` and unnormalised ``weights`` ``[L, K]`` of a token: any fixed function of it."""
    draw = np.random.default_rng([request, position])
    experts = np.stack([draw.permutation(SHAPE[1])[: SHAPE[2]] for _ in range(SHAPE[0])])
    return experts, draw.random((SHAPE[0], SHAPE[2])).astype(np.float32) + 0.1


def token(request: int, position: int) -> int:
    return 1000 * request + position


def run(recorder: Recorder, parts: list[tuple[int, int, int, int, int]], padding: int = 0) -> None:
    """One step over ``parts``: (request, position, rows, prompt length, drafts), and ``padding`` rows behind them."""
    rows = []
    for request, position, count, prompt, drafts in parts:
        tokens = np.array([token(request, position + i) for i in range(count)], np.int32)
        rows.append(ScheduledTokens(str(request), position, tokens, prompt, drafts))
    recorder.begin_step(rows)
    maps = [routing(request, position + i) for request, position, count, *_ in parts for i in range(count)]
    for layer in range(SHAPE[0]):
        experts = np.array([one[0][layer] for one in maps] + [[0, 0]] * padding)
        weights = np.array([one[1][layer] for one in maps] + [[0, 0]] * padding, np.float32)
        recorder.note(layer, experts, weights)
    recorder.end_step()


@st.composite
def schedules(draw: st.DrawFn) -> tuple[dict[int, tuple[int, int]], list[list[tuple[int, int, int, int, int]]]]:
    """Requests (number: prompt and total length) and steps in which each goes on, pauses, or starts over."""
    lengths = {r: (draw(st.integers(1, 9)), draw(st.integers(10, 14))) for r in range(draw(st.integers(1, 3)))}
    done = dict.fromkeys(lengths, 0)
    steps = []
    while any(done[r] < total for r, (_, total) in lengths.items()):
        step = []
        for request, (prompt, total) in lengths.items():
            what = draw(st.sampled_from(["go on", "go on", "pause", "start over"]))
            if what == "start over" and len(steps) < 8:
                done[request] = 0
            if (what == "pause" and step) or done[request] >= total:
                continue
            left = (prompt if done[request] < prompt else total) - done[request]
            count = draw(st.integers(1, left)) if done[request] < prompt else 1
            step.append((request, done[request], count, prompt, 0))
            done[request] += count
        if step:
            steps.append(step)
    return lengths, steps


@settings(deadline=None)
@given(schedules(), st.integers(0, 3))
def test_chunks_pauses_preemptions_and_padding_do_not_show_in_the_trace(schedule, padding: int) -> None:
    lengths, steps = schedule
    recorder = Recorder(SHAPE)
    for step in steps:
        run(recorder, step, padding)
    for request, (prompt, total) in lengths.items():
        trace = recorder.finish(str(request))
        assert trace is not None and trace.shape == SHAPE
        assert trace.tokens is not None and trace.tokens.tolist() == [token(request, i) for i in range(total)]
        assert trace.phase is not None and (trace.phase == PREFILL).tolist() == [i < prompt for i in range(total)]
        for position in range(total):
            experts, weights = routing(request, position)
            np.testing.assert_array_equal(trace.experts[position], experts)
            expected = weights / weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(trace.weights[position], expected, atol=1e-3)
    assert not recorder.running


def test_drafts_are_not_recorded_until_they_are_read_again() -> None:
    recorder = Recorder(SHAPE)
    run(recorder, [(0, 0, 3, 3, 0)])
    run(recorder, [(0, 3, 4, 3, 3)])
    run(recorder, [(0, 4, 1, 3, 0)])
    trace = recorder.finish("0")
    assert trace is not None and trace.tokens is not None and trace.tokens.tolist() == [token(0, i) for i in range(5)]


def test_a_step_that_was_cut_short_is_dropped() -> None:
    recorder = Recorder(SHAPE)
    recorder.begin_step([ScheduledTokens("0", 0, np.array([1], np.int32), 1)])
    recorder.note(0, np.array([[1, 2]]), np.array([[0.5, 0.5]], np.float32))
    assert recorder.end_step() == [] and recorder.finish("0") is None


@pytest.mark.parametrize("lengths", [[1] * 200, [70, 1, 1], [3, 90, 60, 1, 200, 2]])
def test_a_long_request_keeps_its_last_tokens(lengths: list[int]) -> None:
    recorder, position = Recorder(SHAPE, most_tokens=4), 0
    for length in lengths:
        run(recorder, [(0, position, length, 2, 0)])
        position += length
    trace = recorder.finish("0")
    assert trace is not None and trace.tokens is not None
    assert trace.tokens.tolist() == [token(0, i) for i in range(position - 4, position)]
    expected = [routing(0, i)[0].tolist() for i in range(position - 4, position)]
    assert trace.experts.tolist() == expected
