"""Kernels over windows read the right bytes in whatever order the device works, and each rule that is dropped shows."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.device.virtual import CorruptionError, VirtualDevice, VirtualEvent
from tests.runtime.record_stores import RecordStore, build_store, layout
from tests.windows.window_runtimes import Host, WindowRuntime
from vllm_moe_offload.device import Event
from vllm_moe_offload.device.transfer import Copy, TransferQueue
from vllm_moe_offload.load_report import NOTHING
from vllm_moe_offload.pool import Hold, HostPool
from vllm_moe_offload.windows.host_tier import HostReads
from vllm_moe_offload.windows.pool import WindowPool
from vllm_moe_offload.windows.stage import Stage, Stages

RECORD = layout(4096, 12)
EXPERTS, LAYERS, TOP_K = 6, 4, 2
ORDERS = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("store"), [(RECORD, EXPERTS)] * LAYERS)


@pytest.fixture(scope="module")
def whole(made: RecordStore) -> Iterator[Host]:
    """Host memory for every expert."""
    host = Host(made, slots=LAYERS * EXPERTS)
    yield host
    host.close()


@pytest.fixture
def few(made: RecordStore) -> Iterator[Host]:
    """Host memory for a few experts: the others are read from disk."""
    host = Host(made, slots=4)
    yield host
    host.close()


def run(host: Host, order: int, steps: int = 3) -> WindowRuntime:
    """Steps of one to a few rows, and wide ones between them, over windows of all sizes."""
    draw = random.Random(order)
    slots = {f"layer {i}": draw.randint(TOP_K, draw.choice((3, 3, EXPERTS))) for i in range(LAYERS)}
    windows = WindowRuntime(host, VirtualDevice(order), slots, seed=order)
    windows.speculate()
    try:
        for _ in range(steps):
            windows.step(windows.order.choice((1, 1, 1, 2, 20)), TOP_K)
        windows.drain()
        windows.check_contents()
    finally:
        windows.close()
    return windows


def test_right_bytes_in_random_orders(whole: Host) -> None:
    views: set[int] = set()
    for order in range(ORDERS):
        views |= run(whole, order).views
    assert views == {0, 1, 2}


def finished() -> VirtualEvent:
    return VirtualEvent(None)


def kernels_do_not_wait(patch: pytest.MonkeyPatch) -> None:
    wait = VirtualDevice.wait
    patch.setattr(VirtualDevice, "wait", lambda self, stream, event: stream is self.main or wait(self, stream, event))


def kernels_do_not_wait_for_speculative(patch: pytest.MonkeyPatch) -> None:
    promote = TransferQueue.promote
    patch.setattr(TransferQueue, "promote", lambda self, speculative: promote(self, speculative) and finished())


def copies_do_not_wait_for_readers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowPool, "_readers", lambda self: finished())


def readers_are_those_of_earlier_steps(patch: pytest.MonkeyPatch) -> None:
    """Also where a stage has been read since the step began."""
    patch.setattr(WindowPool, "_readers", lambda self: self._clock.step_began)


def a_stage_is_refilled_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stage, "read", property(lambda self: None, lambda self, event: None), raising=False)


def a_wide_step_does_not_wait_at_its_begin(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stage, "free", property(lambda self: self.read, lambda self, event: None), raising=False)


def lent_windows_are_not_reset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowPool, "lend", lambda self: NOTHING)


def stages_outlive_the_windows_that_lend_them(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stages, "forget", lambda self: None)


def host_slots_are_let_go_of_at_once(patch: pytest.MonkeyPatch) -> None:
    def demand(self: HostReads, source: HostPool, hold: Hold, copies: list[Copy]) -> Event:
        event = self.queue.demand(copies)
        source.release(hold)
        return event

    patch.setattr(HostReads, "demand", demand)


def speculative_are_taken_for_copied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TransferQueue, "settled", lambda self, speculative: True)


BUGS = [
    kernels_do_not_wait,
    kernels_do_not_wait_for_speculative,
    copies_do_not_wait_for_readers,
    readers_are_those_of_earlier_steps,
    a_stage_is_refilled_at_once,
    a_wide_step_does_not_wait_at_its_begin,
    lent_windows_are_not_reset,
    stages_outlive_the_windows_that_lend_them,
    host_slots_are_let_go_of_at_once,
    speculative_are_taken_for_copied,
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_rule_that_is_dropped_shows(whole: Host, few: Host, bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    host = few if bug is host_slots_are_let_go_of_at_once else whole
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        with pytest.raises(CorruptionError):
            for order in range(ORDERS):
                run(host, order)


def test_windows_of_one_slot_and_layers_that_differ(tmp_path: Path) -> None:
    """Two layouts, whose layers lie between each other, and other numbers of experts."""
    other = layout(100, 8192, 4096)
    made = build_store(tmp_path, [(RECORD, 6), (other, 5), (RECORD, 4), (RECORD, 6), (other, 5), (RECORD, 6)])
    host = Host(made, slots=8)
    for order in range(30):
        draw = random.Random(order)
        slots = {entry.name: draw.randint(1, entry.experts) for entry in host.store.layers}
        windows = WindowRuntime(host, VirtualDevice(order), slots, seed=order)
        windows.speculate()
        for _ in range(4):
            windows.step(windows.order.choice((1, 1, 2, 20)), top_k=1)
        windows.drain()
        windows.check_contents()
        windows.close()
    host.close()
