"""``DeviceManaged`` with its kernels in Triton's interpreter: narrow and wide steps, padding, ranks, warm windows."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.device.virtual import VirtualDevice
from tests.windows.managed_model import Rows, managed_model, weights_of
from vllm_moe_offload.windows.launches import TritonKernels

LAYERS, EXPERTS, SLOTS = 4, 8, 4
NARROW, GATHERED, LARGE = 2, 4, 8


def check(name: str, reads: Callable[[], Rows], expected: NDArray[np.uint8]) -> None:
    for row, mark in zip(reads(), expected, strict=True):
        for part in row:
            assert (part == int(mark)).all(), f"{name}: {part} is not {mark}"


def routed(rng: np.random.Generator, rows: int, padding: int) -> list[NDArray[np.int32]]:
    real = [np.stack([rng.permutation(EXPERTS)[:2] for _ in range(rows)]) for _ in range(LAYERS)]
    return [np.concatenate([ids, rng.integers(0, EXPERTS, (padding, 2))]).astype(np.int32) for ids in real]


@pytest.mark.parametrize("slots", [SLOTS, 3])
def test_steps_of_all_widths(slots: int) -> None:
    rng = np.random.default_rng(0)
    device = VirtualDevice(0, main_is_host=True)
    kernels = TritonKernels(EXPERTS, programs=2)
    model = managed_model(
        device,
        kernels,
        check,
        layers=LAYERS,
        experts=EXPERTS,
        slots=slots,
        top_k=2,
        most_rows=LARGE,
        gathered_rows=GATHERED,
    )
    steps = []
    for rows, padding in ((1, 0), (1, 1), (NARROW, 0), (3, 1), (1, 0), (LARGE, 0), (1, 0), (6, 2), (4, 0), (1, 0)):
        if rows + padding == NARROW and slots == 3:
            padding, rows = 0, 1
        model.real_rows.fill_(rows)
        if rows == LARGE:
            assert model.managed.warm([np.array([7, 1, 3])] * LAYERS)
        ids = routed(rng, rows, padding)
        model.step(ids, padding)
        steps += model.managed.read_back(rows + padding)
        device.drain()
        steps += model.managed._log.finished()
        assert (steps[-1].ids == np.stack(ids)[:, :rows]).all()
        assert (steps[-1].weights == weights_of(steps[-1].ids).astype(np.float16)).all()
    assert [step.number for step in steps] == list(range(1, 11))
    assert all((step.misses <= step.used).all() for step in steps)
    all_lent = all(layer.window.is_lent for layer in model.layers)
    assert [step.number for step in steps if step.warmed.any()] == ([] if all_lent else [6])


def test_a_warm_window_has_what_it_was_given_and_a_reset_one_nothing() -> None:
    device = VirtualDevice(0, main_is_host=True)
    model = managed_model(
        device, TritonKernels(EXPERTS, programs=2), check, layers=6, experts=EXPERTS, slots=SLOTS, top_k=2
    )
    assert [layer.window.is_lent for layer in model.layers] == [False, False, True, True, True, True]
    model.managed.warm([np.array([], np.int32), *[np.array([6, 2, 5])] * 5])
    model.real_rows.fill_(8)
    model.step([np.tile(np.array([0, 1], np.int32), (8, 1))] * 6)
    steps = model.managed.read_back(8)
    model.real_rows.fill_(2)
    for _ in range(2):
        model.step([np.array([[6, 2], [5, 2]], np.int32)] * 6)
        steps += model.managed.read_back(2) + model.managed.finished()
        model.managed.reset()
    assert [step.warmed.tolist() for step in steps] == [[0, 3, 0, 0, 0, 0], [0] * 6, [0] * 6]
    assert [step.misses.tolist() for step in steps] == [[0] * 6, [3, 0, 3, 3, 3, 3], [3] * 6]


def test_ranks_map_their_own_experts_and_no_others() -> None:
    device = VirtualDevice(0, main_is_host=True)
    record_of = np.full(2 * EXPERTS, -1, np.int32)
    record_of[1::2] = np.arange(EXPERTS)
    model = managed_model(
        device,
        TritonKernels(2 * EXPERTS, programs=2),
        check,
        layers=LAYERS,
        experts=EXPERTS,
        slots=SLOTS,
        top_k=2,
        record_of=record_of,
    )
    rng = np.random.default_rng(1)
    for rows in (1, 2, 4, 2, 8, 1):
        model.real_rows.fill_(rows)
        model.step([rng.integers(0, 2 * EXPERTS, (rows, 2)).astype(np.int32) for _ in range(LAYERS)])
        model.managed.read_back(rows)
