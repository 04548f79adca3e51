"""What requests that begin are going to use, by what similar ones have used."""

import numpy as np
import pytest
from numpy.typing import NDArray

from vllm_moe_offload.runtime import Batch, RoutingTracer, WarmStart
from vllm_moe_offload.runtime.warm_start import NEAREST
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.recorder import Recorder
from vllm_moe_offload.trace.trace import DECODE, PREFILL, Trace

LAYERS, EXPERTS, TOP_K, WIDTH = 2, 16, 2, 4
SHAPE = LAYERS, EXPERTS, TOP_K


def past(topic: int, expert: int, prompt_expert: int = 0) -> Trace:
    """A request of a topic whose answer uses two experts from ``expert`` on in layer 0, and from the one after in 1."""
    experts = np.zeros((6, LAYERS, TOP_K), np.uint8)
    experts[:2], experts[2:] = prompt_expert + np.arange(2), expert + np.arange(2)
    experts[:, 1] = (experts[:, 1] + 1) % EXPERTS
    return Trace(
        experts=experts,
        weights=np.full(experts.shape, 0.5, np.float16),
        offsets=np.array([0, 6]),
        num_experts=EXPERTS,
        phase=np.array([PREFILL] * 2 + [DECODE] * 4, np.uint8),
        embeddings=vector(topic)[None].astype(np.float16),
    )


def vector(topic: int) -> NDArray[np.float32]:
    return np.eye(WIDTH, dtype=np.float32)[topic]


class Beginning(Batch):
    """Requests of these topics begin; one token of the prompt says which."""

    def __init__(self, topics: list[int], running: int = 0):
        names = [f"new {number}" for number in range(len(topics))]
        scheduled = dict.fromkeys([*names, *(f"old {number}" for number in range(running))], 8)
        super().__init__(8 * len(scheduled), (), scheduled)
        self._prompts = {name: [topic] * 8 for name, topic in zip(names, topics, strict=True)}

    def new_prompts(self) -> dict[str, list[int]]:
        return self._prompts


def warm_start(history: HistoryStore) -> WarmStart:
    return WarmStart(history, RoutingTracer(Recorder(SHAPE), lambda *_: None, lambda prompt: vector(prompt[0])))


@pytest.fixture
def history() -> HistoryStore:
    history = HistoryStore(SHAPE)
    for _ in range(NEAREST):
        history.add(past(topic=0, expert=4))
        history.add(past(topic=1, expert=9))
    return history


def wanted(history: HistoryStore, batch: Batch, slots: int = 8) -> list[list[int]] | None:
    found = warm_start(history).experts_for(batch, [slots] * LAYERS)
    return None if found is None else [sorted(layer.tolist()) for layer in found]


def test_a_request_is_expected_to_use_what_answers_to_similar_prompts_used(history: HistoryStore) -> None:
    assert wanted(history, Beginning([0])) == [[4, 5], [5, 6]]
    assert wanted(history, Beginning([1])) == [[9, 10], [10, 11]]


def test_several_share_the_slots_with_each_other_and_with_those_that_run(history: HistoryStore) -> None:
    assert wanted(history, Beginning([0, 1])) == [[4, 5, 9, 10], [5, 6, 10, 11]]
    assert wanted(history, Beginning([0], running=3)) == [[4, 5], [5, 6]]
    assert wanted(history, Beginning([0], running=7)) == [[4], [5]]
    assert wanted(history, Beginning([0], running=8)) is None


def test_nothing_is_expected_where_nothing_is_known(history: HistoryStore) -> None:
    assert wanted(HistoryStore(SHAPE), Beginning([0])) is None
    assert wanted(history, Beginning([], running=2)) is None
    assert wanted(history, Batch(4)) is None


def test_what_all_use_alike_is_not_worth_a_slot() -> None:
    history = HistoryStore(SHAPE)
    for expert in range(0, EXPERTS, 2):
        history.add(past(topic=0, expert=expert))
    assert wanted(history, Beginning([0])) is None


def test_an_error_of_the_search_ends_tracing_and_no_step(history: HistoryStore) -> None:
    start = warm_start(history)
    start._history = None  # type: ignore[assignment]
    assert start.experts_for(Beginning([0]), [8] * LAYERS) is None and start.switch.off
