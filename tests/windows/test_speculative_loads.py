"""Speculative loads on a stream of their own never change what a layer computes, whatever the order of streams."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.device.virtual import CorruptionError, VirtualDevice, VirtualEvent, VirtualStream
from tests.windows.managed_model import ManagedModel, managed_model
from tests.windows.reference_kernels import ReferenceSpeculativeKernels
from tests.windows.test_device_managed import FaultyDevice, Launched, NothingAllocated, checked
from vllm_moe_offload.device.base import DeviceError
from vllm_moe_offload.predict.heads import HeadWeights
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.windows import kernels as triton_kernels
from vllm_moe_offload.windows import launches, speculative_kernels
from vllm_moe_offload.windows.speculative_loads import DeviceSpeculation, HeadSizes
from vllm_moe_offload.windows.step_log import AHEAD

ORDERS, ALL_ORDERS = 80, 1000
ORDERS_WITH_A_BUG = 300
LAYERS, EXPERTS, SLOTS = 4, 4, 2
WIDTH, HIDDEN = 8, 8
SIZE = NetworkSize(LAYERS, EXPERTS, 4, WIDTH, HIDDEN)
HEAD_SIZES = HeadSizes(EXPERTS, WIDTH, HIDDEN)
WEIGHTS = HeadWeights(Parameters.random(SIZE, np.random.default_rng(0)))


class EarlyJoin(FaultyDevice):
    """An event of speculative loads is behind what chose an expert, not behind its copy."""

    def record(self, stream: VirtualStream) -> VirtualEvent:
        event = super().record(stream)
        if stream.name == "speculative loads" and len(stream.queue) > 1:
            return VirtualEvent(stream.queue[-2])
        return event


class BesideSteps(FaultyDevice):
    """Copies heads, and what is known of rows, on a stream of their own."""

    def __init__(self, order: int):
        super().__init__(order)
        self._beside = self.stream("beside")

    def copy(self, stream: VirtualStream, *memory: torch.Tensor) -> None:
        super().copy(self._beside if stream is self.main else stream, *memory)


def speculating_model(
    device: VirtualDevice, distance: int
) -> tuple[ManagedModel, DeviceSpeculation, ReferenceSpeculativeKernels]:
    kernels = ReferenceSpeculativeKernels(device)
    model = managed_model(device, kernels, checked(device), layers=LAYERS, experts=EXPERTS, slots=SLOTS)
    speculation = model.managed.speculate(HEAD_SIZES, kernels, distance=distance, threshold=0.05)
    return model, speculation, kernels


def load(model: ManagedModel, speculation: DeviceSpeculation, weights: HeadWeights = WEIGHTS) -> None:
    """Heads come to the device in steps without rows."""
    speculation.load(weights)
    while not speculation.loaded:
        model.managed.begin_step()
        model.managed.read_back(0)


def run(order: int, device: FaultyDevice) -> int:
    """Narrow and wide steps, some left early, while heads are replaced; how many experts were loaded speculatively."""
    rng = np.random.default_rng(order)
    model, speculation, kernels = speculating_model(device, distance=int(rng.choice([1, 2, 3])))
    load(model, speculation)
    ended = []
    for step in range(8):
        rows = int(rng.choice([1, 2, 2, 3, 8]))
        model.real_rows.fill_(8)
        if step == 4:
            speculation.load(WEIGHTS)
        model.managed.begin_step()
        if rng.random() < 0.9:
            speculation.begin(
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
    return kernels.speculated


def test_no_order_of_streams_lets_a_speculative_load_be_seen(pytestconfig: pytest.Config) -> None:
    orders = ALL_ORDERS if pytestconfig.getoption("exhaustive") else ORDERS
    assert sum(run(order, FaultyDevice(order)) for order in range(orders)) > 2 * orders


@pytest.mark.parametrize(
    "seeded",
    [
        lambda order: FaultyDevice(order, ("speculative loads", "main")),
        lambda order: FaultyDevice(order, ("main", "speculative loads")),
        EarlyJoin,
        BesideSteps,
    ],
    ids=["no fork", "no join", "join before the copy", "heads copied beside steps"],
)
def test_every_wait_of_a_speculative_load_is_needed(seeded: Callable[[int], FaultyDevice]) -> None:
    with pytest.raises((CorruptionError, AssertionError, DeviceError)):
        for order in range(ORDERS_WITH_A_BUG):
            run(order, seeded(order))


def certain(experts: list[int]) -> HeadWeights:
    """Heads by which each layer uses the expert given for it, whatever they see."""
    parameters = Parameters.random(SIZE, np.random.default_rng(0))
    parameters.views["O"][:], parameters.views["c"][:] = 0, -9
    for layer, expert in enumerate(experts):
        parameters.views["c"][layer, 0, expert] = 9
    return HeadWeights(parameters)


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_a_speculative_load_that_comes_true_is_no_miss(distance: int) -> None:
    device = VirtualDevice(random.Random(0))
    model, speculation, _ = speculating_model(device, distance)
    load(model, speculation, certain([3, 2, 1, 0]))
    model.real_rows.fill_(1)
    speculated = [int(layer >= distance) for layer in range(LAYERS)]
    for used, useful in (([0, 3, 2, 1], 0), ([3, 2, 1, 0], 1)):
        model.managed.begin_step()
        assert speculation.begin(np.zeros((1, WIDTH), np.float32), np.zeros((LAYERS, 1, HIDDEN), np.float32))
        model.step([np.array([[expert]], np.int32) for expert in used])
        device.drain()
        steps = model.managed.read_back(1)
        device.drain()
        (step,) = steps or model.managed._log.finished()
        assert step.started.tolist() == ([0] * LAYERS if useful else speculated)
        assert step.useful.tolist() == (speculated if useful else [0] * LAYERS)
        assert step.misses.tolist() == [1 - have if useful else 1 for have in speculated]
    assert speculation._loaded.notes[0, :, 5].tolist() == [have * (4096 + 24) for have in speculated]


def test_heads_are_replaced_between_steps_layer_by_layer_and_serve_when_all_are_there() -> None:
    device = VirtualDevice(random.Random(0))
    model, speculation, kernels = speculating_model(device, distance=1)
    model.real_rows.fill_(1)
    known = np.zeros((1, WIDTH), np.float32), np.zeros((LAYERS, 1, HIDDEN), np.float32)
    begun = []
    for step in range(16):
        if step in (2, 8):
            speculation.load(certain([step % 3] * LAYERS))
        model.managed.begin_step()
        begun.append(speculation.begin(*known))
        before = kernels.speculated
        model.step([np.array([[3]], np.int32)] * LAYERS)
        model.managed.read_back(1)
        device.drain()
        assert begun[-1] or kernels.speculated == before
    assert begun == [step in (6, 7) or step >= 12 for step in range(16)]
    resident = [set(layer.expert_of.tolist()) for layer in model.managed.tables.layers]
    assert resident[1:] == [{3, 8 % 3}] * (LAYERS - 1)


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


def test_speculative_loads_can_be_captured_and_are_joined_before_the_graph_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = {name: Launched() for name in ("observe", "evaluate", "select_speculative", "manage", "gather")}
    for name, kernel in launched.items():
        monkeypatch.setattr(speculative_kernels if hasattr(speculative_kernels, name) else triton_kernels, name, kernel)
    device = CapturedDevice(random.Random(0))
    kernels = launches.TritonKernels(EXPERTS)
    model = managed_model(device, kernels, checked(device), layers=LAYERS, experts=EXPERTS, slots=SLOTS)
    speculation = model.managed.speculate(HEAD_SIZES, kernels, distance=2)
    ids, shares = torch.zeros((2, 1), dtype=torch.int32), torch.ones((2, 1))
    device.captures, device.recorded = True, []
    with NothingAllocated():
        for layer in range(LAYERS):
            model.managed.launch(layer, ids, shares, model.real_rows)
    assert not speculation._under_way
    counts = {name: kernel.count for name, kernel in launched.items()}
    assert counts == {"observe": 2, "evaluate": 2, "select_speculative": 2, "manage": 4, "gather": 4 + 2 * 2}


def test_a_step_that_is_not_captured_launches_nothing_for_speculative_loads_it_does_not_make() -> None:
    device = VirtualDevice(random.Random(0))
    model, speculation, kernels = speculating_model(device, distance=1)
    load(model, speculation)
    model.real_rows.fill_(1)
    model.managed.begin_step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "observe", None)
        model.step([np.array([[1]], np.int32)] * LAYERS)


def test_what_is_known_counts_in_its_step_alone() -> None:
    """A graph that was captured with speculative loads is replayed for a step of which nothing is known."""
    device = VirtualDevice(random.Random(0))
    model, speculation, kernels = speculating_model(device, distance=1)
    load(model, speculation, certain([3] * LAYERS))
    model.real_rows.fill_(1)
    for known in (True, False):
        before = kernels.speculated
        model.managed.begin_step()
        if known:
            speculation.begin(np.zeros((1, WIDTH), np.float32), np.zeros((LAYERS, 1, HIDDEN), np.float32))
        speculation.enabled = True
        model.step([np.array([[int(known)]], np.int32)] * LAYERS)
        model.step([np.array([[int(known)]], np.int32)] * LAYERS)
        model.managed.read_back(1)
        device.drain()
        assert (kernels.speculated > before) == known
        model.managed.reset()
