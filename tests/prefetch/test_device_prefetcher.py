"""What a device that predicts by itself is given, and when; the governor sees times of steps after they have ended."""

from collections import deque
from collections.abc import Sequence
from functools import partial
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_moe_offload.predict.base import ModelShape, TokenMap
from vllm_moe_offload.predict.heads import HeadsPredictor, HeadWeights
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import LearnedVectors
from vllm_moe_offload.prefetch.device_prefetcher import DevicePrefetcher
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.recorder import Recorder, RequestMaps, ScheduledTokens
from vllm_moe_offload.trace.trace import UNKNOWN_TOKEN

SHAPE = ModelShape(3, 6, 2)
MOST_ROWS = 4


class Device:
    """Notes what it is given; heads are there at once."""

    def __init__(self) -> None:
        self.step = 1
        self.loaded: list[HeadWeights] = []
        self.begun: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def load(self, weights: HeadWeights) -> None:
        self.loaded.append(weights)

    def begin(self, state: NDArray[np.float32], known: NDArray[np.float32]) -> bool:
        self.begun[self.step] = state, known
        return True


def heads(seed: int = 0) -> HeadsPredictor:
    vectors = LearnedVectors(4)
    vectors.grow(np.arange(10))
    parameters = Parameters.random(NetworkSize(*SHAPE[:2], 4, 8, 8), np.random.default_rng(seed))
    return HeadsPredictor(SHAPE, parameters, vectors)


def no_wait() -> None:
    pass


def one(request: str, position: int, token: int, prompt: int = 1) -> ScheduledTokens:
    return ScheduledTokens(request, position, np.array([token], np.int32), prompt)


def routed(rows: Sequence[ScheduledTokens], seed: int) -> list[RequestMaps]:
    rng, recorder = np.random.default_rng(seed), Recorder(SHAPE)
    count = sum(len(part.tokens) for part in rows)
    recorder.begin_step(rows)
    for layer in range(SHAPE.layers):
        recorder.note(layer, rng.permuted(np.tile(np.arange(6), (count, 1)), axis=1)[:, :2], rng.random((count, 2)))
    return recorder.end_step()


@pytest.fixture
def predictor() -> HistoryPredictor:
    return HistoryPredictor(SHAPE, HistoryStore(SHAPE))


class Always(DevicePrefetcher):
    """Predicts without asking the governor."""

    def __init__(self, predictor: HistoryPredictor, device: Device, tokens_come_late: bool = False):
        super().__init__(predictor, device, MOST_ROWS, tokens_come_late)
        self._governor.predicts = lambda kind: True  # type: ignore[method-assign]


def test_what_is_given_is_what_the_heads_would_begin_with(predictor: HistoryPredictor) -> None:
    device, reference = Device(), heads()
    prefetcher = Always(predictor, device)
    prefetcher.begin_step([one("a", 0, 3)], {}, no_wait)
    assert not device.begun and not device.loaded, "there are no heads yet"
    predictor.use_heads(heads(), 100)
    states = {name: HistoryPredictor.start_request(predictor) for name in "ab"}
    rows = [one("a", 1, 4), one("b", 0, 5)]
    for device.step in range(2, 6):
        prefetcher.begin_step(rows, {}, no_wait)
        step = reference.begin([states[part.request].context(int(part.tokens[0])) for part in rows])
        state, known = device.begun[device.step]
        assert np.array_equal(state, step._state)
        for layer in range(SHAPE.layers):
            assert np.array_equal(known[layer], reference.weights.hidden_before(layer, step._known))
        maps = routed(rows, device.step)
        prefetcher.end_step(maps)
        for part in maps:
            states[part.rows.request].advance(int(part.tokens[0]), TokenMap(part.experts[0], part.weights[0]))
        rows = [one("b", device.step - 1, 6), one("a", device.step, 7)]
    assert len(device.loaded) == 1
    assert prefetcher.end_request("a") is not None and prefetcher.end_request("a") is None
    assert not prefetcher.switch.off


def test_heads_are_given_when_they_are_replaced_and_rows_only_where_they_are_few(predictor: HistoryPredictor) -> None:
    device = Device()
    prefetcher = Always(predictor, device)
    given = []
    for seed in range(2):
        predictor.use_heads(heads(seed), 100)
        assert predictor.heads is not None
        given.append(predictor.heads.weights)
        for device.step, count in enumerate((1, MOST_ROWS, MOST_ROWS + 1, 0), start=4 * seed):
            prefetcher.begin_step([one(str(row), 1, row) for row in range(count)], {}, no_wait)
    assert device.loaded == given
    assert list(device.begun) == [0, 1, 4, 5]


@pytest.mark.parametrize("come_late", [False, True])
def test_tokens_are_waited_for_or_not_read(predictor: HistoryPredictor, come_late: bool) -> None:
    device = Device()
    prefetcher = Always(predictor, device, come_late)
    predictor.use_heads(heads(), 100)
    for device.step, right in enumerate((3, UNKNOWN_TOKEN)):
        part = one(str(device.step), 1, 7)
        prefetcher.begin_step([part], {}, partial(part.tokens.fill, right))
    seen, unknown = (device.begun[step][0] for step in range(2))
    assert np.array_equal(seen, unknown) == come_late


def test_what_raises_ends_prediction_and_nothing_else(predictor: HistoryPredictor) -> None:
    device = Device()
    prefetcher = Always(predictor, device)
    predictor.use_heads(heads(), 100)
    device.begin = lambda *_: 1 / 0  # type: ignore[assignment]
    prefetcher.begin_step([one("a", 1, 3)], {}, no_wait)
    assert prefetcher.switch.off
    prefetcher.begin_step([one("a", 2, 3)], {}, no_wait)
    prefetcher.end_step(routed([one("a", 2, 3)], 0))


@pytest.mark.parametrize(("cost", "least", "most"), [(1.1, 0.0, 0.1), (0.9, 0.6, 1.0)])
def test_the_governor_decides_by_times_that_come_late(
    predictor: HistoryPredictor, cost: float, least: float, most: float
) -> None:
    """Steps that are predicted take ``cost`` times as long; the host is two steps ahead."""
    device, draw, steps = Device(), Random(1), 12_000
    prefetcher = DevicePrefetcher(predictor, device, MOST_ROWS, False)
    predictor.use_heads(heads(), 100)
    under_way: deque[tuple[int, float]] = deque()
    for device.step in range(1, steps + 1):
        prefetcher.begin_step([one("a", device.step, 3)], {}, no_wait)
        seconds = 5e-3 * draw.uniform(0.95, 1.05) * (cost if device.step in device.begun else 1.0)
        under_way.append((device.step, seconds))
        if len(under_way) > 2:
            prefetcher.note_time(*under_way.popleft())
    assert not prefetcher.switch.off
    assert least <= len(device.begun) / steps <= most
