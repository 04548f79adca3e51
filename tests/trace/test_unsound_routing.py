"""A router that goes wrong for a token costs that token, and never what has been or will be recorded."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_trace_file import make_trace

from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.neighbours import NeighboursPredictor
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.prompt_embedding import mean_embedding
from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens
from vllm_moe_offload.trace.trace_file import read_trace
from vllm_moe_offload.trace.trace_recording import TraceRecording

SHAPE = (2, 8, 2)
TOKENS = 4
NAN, INF = float("nan"), float("inf")


def record(recorder: Recorder, experts: np.ndarray, weights: np.ndarray, request: str = "r") -> None:
    """One step of a request over tokens 0, 1, … that were routed so: ``[T, L, K]``."""
    recorder.begin_step([ScheduledTokens(request, 0, np.arange(len(experts), dtype=np.int32), len(experts))])
    for layer in range(SHAPE[0]):
        recorder.note(layer, experts[:, layer], weights[:, layer])
    recorder.end_step()


def sound() -> tuple[np.ndarray, np.ndarray]:
    return np.tile(np.array([1, 2]), (TOKENS, SHAPE[0], 1)), np.full((TOKENS, *SHAPE[::2]), 0.5, np.float32)


@pytest.mark.parametrize(
    ("experts", "weights"),
    [
        ([1, 2], [NAN, 0.5]),
        ([1, 2], [INF, 0.5]),
        ([1, 2], [0, 0]),
        ([1, 2], [1.2, -0.2]),
        ([1, 2], [3e38, 3e38]),
        ([3, 3], [0.5, 0.5]),
        ([1, -1], [0.5, 0.5]),
        ([1, 8], [0.5, 0.5]),
        ([1, 257], [0.5, 0.5]),
    ],
    ids=str,
)
def test_a_token_that_no_trace_can_hold_is_left_out_and_counted(
    tmp_path: Path, experts: list[int], weights: list[float]
) -> None:
    chosen, shares = sound()
    chosen[2, 1], shares[2, 1] = experts, weights
    recorder, history = Recorder(SHAPE), HistoryStore(SHAPE)
    for number in range(3):
        record(recorder, *sound(), request=str(number))
    record(recorder, chosen, shares, request="bad")
    recording = TraceRecording(tmp_path / "t.trace", SHAPE, "model", "aa")
    for request in recorder.running:
        trace = recorder.finish(request)
        assert trace is not None and trace.tokens is not None
        assert trace.tokens.tolist() == ([0, 1, 3] if request == "bad" else [0, 1, 2, 3])
        history.add(trace)
        recording.add(trace)
    recording.write()
    assert recorder.unsound_tokens == 1
    HistoryArchive(tmp_path).save("aa", history)
    loaded, problem = HistoryArchive(tmp_path).load("aa", SHAPE)
    assert problem is None and loaded.num_tokens == 15
    assert read_trace(tmp_path / "t.trace").num_tokens == 15


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    experts=arrays.arrays(np.int64, (TOKENS, *SHAPE[::2]), elements=st.integers(-2, SHAPE[1] + 1)),
    weights=arrays.arrays(np.float32, (TOKENS, *SHAPE[::2]), elements=st.floats(width=32)),
    vectors=arrays.arrays(np.float32, (3, 4), elements=st.floats(width=32)),
)
def test_whatever_is_recorded_can_be_saved_and_loaded(
    tmp_path: Path, experts: np.ndarray, weights: np.ndarray, vectors: np.ndarray
) -> None:
    recorder, history = Recorder(SHAPE), HistoryStore(SHAPE)
    record(recorder, experts, weights)
    record(recorder, *sound(), request="sound")
    for request in ("r", "sound"):
        trace = recorder.finish(request)
        if trace is not None:
            history.add(trace)
    assert recorder.unsound_tokens + history.num_tokens == 2 * TOKENS
    assert np.isfinite(mean_embedding(np.arange(len(vectors)), vectors.__getitem__)).all()
    archive = HistoryArchive(tmp_path)
    archive.save("aa", history)
    loaded, problem = archive.load("aa", SHAPE)
    assert problem is None
    assert np.array_equal(loaded.to_trace().experts, history.to_trace().experts)
    assert np.array_equal(loaded.to_trace().weights, history.to_trace().weights)


def test_a_request_goes_on_after_a_token_that_was_left_out() -> None:
    recorder = Recorder(SHAPE)
    experts, weights = sound()
    weights[-1] = NAN
    record(recorder, experts, weights)
    recorder.begin_step([ScheduledTokens("r", TOKENS - 1, np.array([3, 4], np.int32), TOKENS)])
    for layer in range(SHAPE[0]):
        recorder.note(layer, experts[:2, layer], np.full((2, 2), 0.5, np.float32))
    (maps,) = recorder.end_step()
    assert maps.tokens.tolist() == [4], "the step before has been through token 3"
    trace = recorder.finish("r")
    assert trace is not None and trace.tokens is not None and trace.tokens.tolist() == [0, 1, 2, 4]


def test_the_history_takes_no_trace_that_its_file_could_not_hold() -> None:
    history, trace = HistoryStore((4, 8, 2)), make_trace((3,))
    trace.weights[1, 2] = np.nan
    with pytest.raises(ValueError, match="none that a trace can hold"):
        history.add(trace)
    trace = make_trace((3,))
    assert trace.embeddings is not None
    trace.embeddings[0, 0] = np.inf
    with pytest.raises(ValueError, match="embeddings: holds values that are not finite"):
        history.add(trace)
    assert history.num_requests == 0


def test_weights_that_are_no_numbers_cost_neighbours_one_layer_of_one_step() -> None:
    shape = ModelShape(4, 8, 2)
    history = HistoryStore(shape)
    history.add(make_trace((50,)))
    predictor = NeighboursPredictor(shape, history, 100)
    state = predictor.start_request()
    for weights in ([NAN, 0.5], [-0.5, 0.5], [0.5, 0.5]):
        step = predictor.begin([state.context(7)])
        for layer in range(2):
            step.observe(layer, np.array([[1, 2]]), np.array([weights], np.float32))
        assert np.isfinite(step.predict(3)).all()
