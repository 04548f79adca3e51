"""Guesses on a stream of their own never change what a layer computes, whatever the order of streams."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.device.virtual import CorruptionError, VirtualDevice, VirtualEvent, VirtualStream
from tests.windows.managed_model import ManagedModel, managed_model
from tests.windows.reference_kernels import ReferenceGuessKernels
from tests.windows.test_device_managed import FaultyDevice, Launched, NothingAllocated, checked
from vllm_moe_offload.device.base import DeviceError
from vllm_moe_offload.predict.heads import HeadWeights
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.windows import guess_kernels, launches
from vllm_moe_offload.windows import kernels as triton_kernels
from vllm_moe_offload.windows.guesses import Guesses
from vllm_moe_offload.windows.step_log import AHEAD

ORDERS, ALL_ORDERS = 80, 1000
ORDERS_WITH_A_BUG = 300
LAYERS, EXPERTS, SLOTS = 4, 4, 2
WIDTH, HIDDEN = 8, 8
SIZE = NetworkSize(LAYERS, EXPERTS, 4, WIDTH, HIDDEN)


class EarlyJoin(FaultyDevice):
    """An event of guesses is behind what chose an expert, not behind its copy."""

    def record(self, stream: VirtualStream) -> VirtualEvent:
        event = super().record(stream)
        if stream.name == "guesses" and len(stream.queue) > 1:
            return VirtualEvent(stream.queue[-2])
        return event


def guessing_model(device: VirtualDevice, distance: int) -> tuple[ManagedModel, Guesses, ReferenceGuessKernels]:
    kernels = ReferenceGuessKernels(device)
    model = managed_model(device, kernels, checked(device), layers=LAYERS, experts=EXPERTS, slots=SLOTS)
    weights = HeadWeights(Parameters.random(SIZE, np.random.default_rng(0)))
    model.weighted = True
    return model, model.managed.guess(weights, kernels, distance=distance, threshold=0.05), kernels


def run(order: int, device: FaultyDevice) -> int:
    """Narrow and wide steps, some left early; how many experts were guessed."""
    rng = np.random.default_rng(order)
    model, guesses, kernels = guessing_model(device, distance=int(rng.choice([1, 2])))
    ended = []
    for step in range(6):
        rows = int(rng.choice([1, 2, 2, 3, 8]))
        model.real_rows.fill_(8)
        guesses.begin(
            rng.standard_normal((min(rows, 2), WIDTH), np.float32),
            rng.standard_normal((LAYERS, min(rows, 2), HIDDEN), np.float32),
        )
        ids = [rng.integers(0, EXPERTS, (rows, 1)).astype(np.int32) for _ in range(LAYERS)]
        model.step(ids[: LAYERS if rng.random() < 0.85 else 2])
        model.managed.read_back(rows)
        ended.append(device.record(device.main))
        if step >= AHEAD:
            device.synchronize(ended[step - AHEAD])
    device.drain()
    return kernels.guessed


def test_no_order_of_streams_lets_a_guess_be_seen(pytestconfig: pytest.Config) -> None:
    orders = ALL_ORDERS if pytestconfig.getoption("exhaustive") else ORDERS
    assert sum(run(order, FaultyDevice(order)) for order in range(orders)) > 2 * orders


@pytest.mark.parametrize(
    "seeded",
    [
        lambda order: FaultyDevice(order, ("guesses", "main")),
        lambda order: FaultyDevice(order, ("main", "guesses")),
        EarlyJoin,
    ],
    ids=["no fork", "no join", "join before the copy"],
)
def test_every_wait_of_a_guess_is_needed(seeded: Callable[[int], FaultyDevice]) -> None:
    with pytest.raises((CorruptionError, AssertionError, DeviceError)):
        for order in range(ORDERS_WITH_A_BUG):
            run(order, seeded(order))


def test_a_guess_that_comes_true_is_no_miss() -> None:
    device = VirtualDevice(random.Random(0))
    model, guesses, _ = guessing_model(device, distance=1)
    model.real_rows.fill_(1)
    score = {layer: EXPERTS - 1 - layer for layer in range(LAYERS)}
    for layer, head in enumerate(guesses._heads):
        head.outer.zero_()
        head.bias.fill_(-9.0)
        head.bias[score[layer]] = 9.0
    guesses.begin(np.zeros((1, WIDTH), np.float32), np.zeros((LAYERS, 1, HIDDEN), np.float32))
    model.step([np.array([[score[layer]]], np.int32) for layer in range(LAYERS)])
    model.managed.read_back(1)
    device.drain()
    assert [step.misses.tolist() for step in model.managed._log.finished()] == [[1, 0, 0, 0]]
    assert guesses._loaded.notes[0, 1:, 6].tolist() == [4096 + 24] * (LAYERS - 1)


class CapturedDevice(VirtualDevice):
    """While ``captures``, only events that were recorded meanwhile may be waited for, and nothing is copied."""

    captures = False
    recorded: list[VirtualEvent]

    def record(self, stream: VirtualStream) -> VirtualEvent:
        event = super().record(stream)
        if self.captures:
            self.recorded.append(event)
        return event

    def wait(self, stream: VirtualStream, event: VirtualEvent) -> None:
        assert not self.captures or event in self.recorded, "an event of another time is waited for in a graph"
        super().wait(stream, event)

    def copy(self, *args: Any) -> None:
        assert not self.captures, "a copy in a graph"
        super().copy(*args)


def test_guesses_can_be_captured_and_are_joined_before_the_graph_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {name: Launched() for name in ("observe", "evaluate", "select_guess", "manage", "gather")}
    for name, kernel in launched.items():
        monkeypatch.setattr(guess_kernels if hasattr(guess_kernels, name) else triton_kernels, name, kernel)
    device = CapturedDevice(random.Random(0))
    kernels = launches.TritonKernels(EXPERTS)
    model = managed_model(device, kernels, checked(device), layers=LAYERS, experts=EXPERTS, slots=SLOTS)
    weights = HeadWeights(Parameters.random(SIZE, np.random.default_rng(0)))
    guesses = model.managed.guess(weights, kernels, distance=2, threshold=0.7)
    ids, shares = torch.zeros((2, 1), dtype=torch.int32), torch.ones((2, 1))
    device.captures, device.recorded = True, []
    with NothingAllocated():
        for layer in range(LAYERS):
            model.managed.launch(layer, ids, model.real_rows, shares)
    assert not guesses._under_way
    counts = {name: kernel.count for name, kernel in launched.items()}
    assert counts == {"observe": 4, "evaluate": 2, "select_guess": 2, "manage": 4, "gather": 6}


def test_without_rows_nothing_is_guessed() -> None:
    device = VirtualDevice(random.Random(0))
    model, _, kernels = guessing_model(device, distance=1)
    model.real_rows.fill_(1)
    model.step([np.array([[1]], np.int32)] * LAYERS)
    model.managed.read_back(1)
    device.drain()
    assert kernels.guessed == 0
