"""A device that manages its windows by itself: nothing that streams may do in another order changes what is computed.

Kernels are the policy in numpy, enqueued on a device whose work runs late and in any order that its waits allow.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device.virtual import CorruptionError, Memory, VirtualDevice, VirtualEvent, VirtualStream
from tests.windows.managed_model import LAYOUT, Rows, managed_model, weights_of
from tests.windows.reference_kernels import ReferenceKernels
from vllm_moe_offload.device.base import DeviceError
from vllm_moe_offload.windows import kernels as triton_kernels
from vllm_moe_offload.windows import launches
from vllm_moe_offload.windows.device_tables import DeviceTables
from vllm_moe_offload.windows.step_log import AHEAD

ORDERS, ALL_ORDERS = 120, 1000
ORDERS_WITH_A_BUG = 400
LAYERS, EXPERTS = 4, 3
SLOTS = [1, 2]
"""With one, there is one stage."""
STEPS = 6


class FaultyDevice(VirtualDevice):
    """Leaves out the waits of ``waiting`` for work of ``awaited``, and notes whether anybody waited on the host."""

    def __init__(self, order: int, left_out: tuple[str, str] | None = None):
        super().__init__(random.Random(order))
        self.left_out = left_out
        self.synchronized = 0

    def wait(self, stream: VirtualStream, event: VirtualEvent) -> None:
        awaited = event.operation.stream.name if event.operation else ""
        if (stream.name, awaited) != self.left_out:
            super().wait(stream, event)

    def synchronize(self, event: VirtualEvent) -> None:
        self.synchronized += 1
        super().synchronize(event)


class RememberingKernels(ReferenceKernels):
    """Leaves lent windows as they are."""

    def forget(self, tables: DeviceTables) -> None:
        pass


def checked(device: VirtualDevice) -> Callable[[str, Callable[[], Rows], NDArray[np.uint8]], None]:
    """A layer's kernel as work of the device."""

    def check(name: str, reads: Callable[[], Rows], expected: NDArray[np.uint8]) -> None:
        def compute(values: list[Memory]) -> None:
            wanted = np.repeat(expected, len(LAYOUT.components)).tolist()
            if any((np.asarray(value) != mark).any() for value, mark in zip(values, wanted, strict=True)):
                raise CorruptionError(f"{name} did not read records {wanted}")

        device.kernel(device.main, lambda: [part for row in reads() for part in row], compute, name=name)

    return check


def run(
    order: int, left_out: tuple[str, str] | None = None, kernels: type[ReferenceKernels] = ReferenceKernels
) -> None:
    """Narrow, wide and very wide steps, some left early; the host is ahead as an engine that waits for tokens."""
    device = FaultyDevice(order, left_out)
    rng = np.random.default_rng(order)
    slots = int(rng.choice(SLOTS))
    model = managed_model(device, kernels(device), checked(device), layers=LAYERS, experts=EXPERTS, slots=slots)
    routed, ended, seen = {}, [], []
    model.real_rows.fill_(8)
    for step in range(STEPS):
        rows = int(rng.choice([1, 2, 3, 8]))
        ids = [rng.integers(0, EXPERTS, (rows, 1)).astype(np.int32) for _ in range(LAYERS)]
        if rng.random() < 0.4:
            assert model.managed.warm([rng.permutation(EXPERTS)[: rng.integers(slots + 1)] for _ in range(LAYERS)])
        if rng.random() < 0.2:
            model.step(ids[: LAYERS // 2])  # an exception ends it
        else:
            model.step(ids)
            routed[step + 1] = np.stack(ids)
        seen += model.managed.read_back(rows)
        assert not device.synchronized, "the host waits only where it is further ahead than an engine"
        ended.append(device.record(device.main))
        if step >= AHEAD:
            VirtualDevice.synchronize(device, ended[step - AHEAD])
    device.drain()
    seen += model.managed._log.finished()
    assert [step.number for step in seen] == list(routed)
    for step in seen:
        assert (step.ids == routed[step.number]).all()
        assert (step.weights == weights_of(routed[step.number]).astype(np.float16)).all()


def test_no_order_of_streams_shows_a_kernel_another_record(pytestconfig: pytest.Config) -> None:
    for order in range(ALL_ORDERS if pytestconfig.getoption("exhaustive") else ORDERS):
        run(order)


@pytest.mark.parametrize(
    "left_out", [("stages", "main"), ("main", "stages"), ("step log", "main"), ("main", "step log")], ids=" for ".join
)
def test_every_wait_is_needed(left_out: tuple[str, str]) -> None:
    with pytest.raises((CorruptionError, AssertionError, DeviceError)):
        for order in range(ORDERS_WITH_A_BUG):
            run(order, left_out)


def test_windows_lent_to_a_stage_have_to_be_forgotten() -> None:
    with pytest.raises(CorruptionError):
        for order in range(ORDERS_WITH_A_BUG):
            run(order, kernels=RememberingKernels)


class NothingAllocated(TorchDispatchMode):
    """Lets through what makes views or writes in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func._schema.name.endswith("_")
        assert func.is_view or in_place, f"{func} allocates, or looks at the device"
        return func(*args, **(kwargs or {}))


class Launched:
    """Stands for a kernel: notes that it was launched."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **kwargs: object) -> None:
            self.count += 1

        return launch


class SilentDevice(VirtualDevice):
    """Refuses whatever may not be in a graph, once ``captures``."""

    captures = False

    def _check(self) -> None:
        assert not self.captures, "a graph is captured: neither copies, events nor memory of others"
        super()._check()


def test_what_is_launched_for_a_step_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {name: Launched() for name in ("manage", "stage", "gather", "note")}
    for name, kernel in launched.items():
        monkeypatch.setattr(triton_kernels, name, kernel)
    device = SilentDevice(0)
    model = managed_model(device, launches.TritonKernels(EXPERTS), checked(device), gathered_rows=4)
    narrow, wide = torch.zeros((2, 1), dtype=torch.int64), torch.zeros((4, 1), dtype=torch.int32)
    weights = torch.zeros((4, 1))
    device.captures = True
    with NothingAllocated():
        for layer in range(LAYERS):
            ids = model.managed.launch(layer, narrow, weights[:2], model.real_rows)
            assert ids.shape == narrow.shape and ids.dtype == narrow.dtype
        for layer in range(LAYERS):
            model.managed.launch_wide(layer, wide, weights, model.real_rows)
    assert {name: kernel.count for name, kernel in launched.items()} == {
        "manage": 4,
        "stage": 4,
        "gather": 8,
        "note": 0,
    }


@pytest.mark.parametrize("broken", ["allocates", "reads", "waits"])
def test_what_cannot_be_captured_is_found(broken: str) -> None:
    device, rows = SilentDevice(0), torch.ones(1)
    device.captures = True
    with NothingAllocated(), pytest.raises(AssertionError):
        if broken == "allocates":
            torch.zeros(3)
        elif broken == "reads":
            rows.item()
        else:
            device.record(device.main)


def test_a_step_that_does_not_fit_ends_the_worker() -> None:
    device = VirtualDevice(0)
    model = managed_model(device, ReferenceKernels(device), checked(device))
    model.real_rows.fill_(2)
    model.step([np.array([[0], [1]], np.int32)] * LAYERS)
    device.drain()
    model.managed._log.ring.notes[1, 2, 4] = 1
    model.managed.read_back(2)
    device.drain()
    with pytest.raises(DeviceError, match="layer 2 than its window has slots"):
        model.managed._log.finished()


def test_records_that_were_not_copied_end_the_worker() -> None:
    class LazyKernels(ReferenceKernels):
        def gather(self, *args: Any) -> None:
            pass

    device = VirtualDevice(0)
    model = managed_model(device, LazyKernels(device), lambda *_: None)
    model.real_rows.fill_(1)
    model.step([np.array([[1]], np.int32)] * LAYERS)
    model.managed.read_back(1)
    device.drain()
    with pytest.raises(DeviceError, match="copied 0 bytes"):
        model.managed._log.finished()


def test_a_step_without_rows_ends_like_any_other() -> None:
    device = VirtualDevice(0)
    model = managed_model(device, ReferenceKernels(device), checked(device))
    model.real_rows.fill_(1)
    seen = model.managed.read_back(0)
    model.step([np.array([[1]], np.int32)] * LAYERS)
    seen += model.managed.read_back(1)
    device.drain()
    seen += model.managed._log.finished()
    assert [step.number for step in seen] == [2] and (seen[0].ids == 1).all()


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_windows_are_warmed_while_all_experts_pass_through_stages_and_not_otherwise(rows: int) -> None:
    device = VirtualDevice(0)
    model = managed_model(device, ReferenceKernels(device), checked(device), layers=6, experts=4, slots=2)
    lent = [layer.window.is_lent for layer in model.layers]
    assert sorted(set(lent)) == [False, True]
    model.real_rows.fill_(8)
    for wanted in ([3, 1], [0, 2], [2]):
        assert model.managed.warm([np.array(wanted)] * 6)
        model.step([np.zeros((rows, 1), np.int32)] * 6)
        steps = model.managed.read_back(rows)
        model.step([np.array([[expert] for expert in wanted], np.int32)] * 6)
        steps += model.managed.read_back(len(wanted))
        steps += model.managed.finished()
        warmed = [0 if is_lent else len(wanted) for is_lent in lent]
        assert steps[-1].warmed.tolist() == [0] * 6, "in the step that it was given for"
        if rows == 8:
            assert [a + b for a, b in zip(steps[-1].misses.tolist(), warmed, strict=True)] == [len(wanted)] * 6
            assert steps[-2].warmed.tolist() == warmed
        else:
            assert not steps[-2].warmed.any() and steps[-1].misses.any()
        model.managed.reset()


def test_a_window_that_stages_overwrite_must_not_be_warmed() -> None:
    def run_to_the_end(order: int) -> None:
        device = VirtualDevice(order)
        model = managed_model(device, ReferenceKernels(device), checked(device), layers=6, experts=4, slots=2)
        for tables in model.managed._warming._tables:
            tables.window = replace(tables.window, is_lent=False)
        model.real_rows.fill_(8)
        model.managed.warm([np.array([3, 1])] * 6)
        model.step([np.zeros((8, 1), np.int32)] * 6)
        model.managed.read_back(8)
        model.step([np.array([[3], [1]], np.int32)] * 6)
        model.managed.read_back(2)
        device.drain()

    with pytest.raises(CorruptionError):
        for order in range(ORDERS_WITH_A_BUG):
            run_to_the_end(order)


def test_a_host_that_is_further_ahead_than_an_engine_warms_nothing() -> None:
    device = VirtualDevice(0, frozen=True)
    model = managed_model(device, ReferenceKernels(device), checked(device))
    assert [model.managed.warm([np.array([1])] * LAYERS) for _ in range(AHEAD + 2)] == [True] * (AHEAD + 1) + [False]


@pytest.mark.parametrize("ids", [torch.zeros((9, 1), dtype=torch.int32), torch.zeros((5, 2), dtype=torch.int32)[:, :1]])
def test_ids_that_kernels_would_read_or_write_elsewhere_are_refused(ids: torch.Tensor) -> None:
    device = VirtualDevice(0)
    model = managed_model(device, ReferenceKernels(device), checked(device), most_rows=8)
    with pytest.raises(AssertionError, match="one after the other"):
        model.managed.launch_wide(0, ids, torch.zeros(ids.shape), model.real_rows)
