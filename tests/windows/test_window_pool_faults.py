"""What goes wrong behind windows: kernels never read bytes of something else for a record, and the rest goes on."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.virtual import VirtualDevice
from tests.runtime.record_stores import RecordStore, build_store
from tests.runtime.test_left_early import Raise, at_every_line, lines_of
from tests.windows.test_window_pool import EXPERTS, LAYERS, RECORD, TOP_K, run
from tests.windows.window_runtimes import Host, WindowRuntime
from vllm_moe_offload.device import DeviceError, OutOfDeviceMemoryError
from vllm_moe_offload.errors import LoadError
from vllm_moe_offload.pool import HostPool, local_pools
from vllm_moe_offload.pool.base import PoolGoneError

SLOTS = {f"layer {i}": 3 for i in range(LAYERS)}
WHOLE_LAYERS = {f"layer {i}": EXPERTS for i in range(LAYERS)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RecordStore:
    return build_store(tmp_path_factory.mktemp("store"), [(RECORD, EXPERTS)] * LAYERS)


@pytest.fixture
def host(made: RecordStore) -> Iterator[Host]:
    host = Host(made, slots=LAYERS * EXPERTS)
    yield host
    host.close()


@pytest.mark.parametrize("slots", [2, 4, EXPERTS])
def test_host_memory_for_few_experts(made: RecordStore, slots: int) -> None:
    """A layer passes through it in parts, and slots are used again as soon as their copies are made."""
    host = Host(made, slots)
    for order in range(20):
        windows = run(host, order)
        counters = windows.runtime.stats
        assert counters.loads > 0 and counters.host_hits < counters.misses
    host.close()


def test_what_is_counted(host: Host) -> None:
    slots = {"layer 0": 3, "layer 1": 5, "layer 2": 5, "layer 3": 5}  # the first window is in no stage
    windows = WindowRuntime(host, VirtualDevice(0), slots, seed=0)
    layer, counters = windows.runtime.layers["layer 0"], windows.runtime.stats
    for chosen, counted in (
        ([[0, 1]], (0, 2, 0)),  # read from disk
        ([[0, 1]], (2, 2, 0)),
        ([[2, 3]], (2, 4, 0)),  # one of the first two leaves
        ([[0, 1]], (3, 5, 1)),  # and comes back from host memory
        ([[0, 1], [2, 3], [4, 5]], (6, 8, 2)),  # three are in the window, one in host memory
    ):
        windows.serve(layer, np.array(chosen, dtype=np.int32))
        assert (counters.hits, counters.misses, counters.host_hits) == counted
        assert counters.loads == counters.misses - counters.host_hits
    windows.drain()
    assert counters.copied_bytes == counters.misses * RECORD.payload_bytes
    windows.close()


def test_everything_in_its_own_slot(host: Host) -> None:
    windows = WindowRuntime(host, VirtualDevice(0), WHOLE_LAYERS, seed=0)
    windows.runtime.load_everything()
    for layer in windows.runtime.layers.values():
        for expert in range(EXPERTS):
            rows = layer.pool.memory.tensors(layer.pool.member, 0)
            for component, right in zip(rows, host.made.records[layer.index][expert], strict=True):
                assert np.array_equal(component[expert].numpy(), right)
    windows.close()


def test_everything_where_a_record_is_damaged(host: Host) -> None:
    host.made.flip(1, 2)
    windows = WindowRuntime(host, VirtualDevice(0), WHOLE_LAYERS, seed=0)
    with pytest.raises(LoadError, match="expert 2 of layer 1"):
        windows.runtime.load_everything()
    windows.close()
    host.made.flip(1, 2)


def test_damaged_records_void_the_rows_that_need_them(made: RecordStore) -> None:
    damaged = {(0, 1), (2, 4), (2, 5), (3, 0)}
    for order in range(20):
        host = Host(made, slots=EXPERTS)
        windows = WindowRuntime(host, VirtualDevice(order), SLOTS, seed=order)
        windows.speculate()
        windows.damaged = damaged
        for layer, expert in damaged:
            made.flip(layer, expert)
        for rows in (1, 2, 20, 1):
            windows.step(rows, TOP_K)
        windows.drain()
        for layer, expert in damaged:
            made.flip(layer, expert)
        windows.damaged = set()
        for pool in host.pools.values():
            pool.loader.join([started.load for started in pool.in_flight.loads])
        for rows in (20, 1, 1):
            windows.step(rows, TOP_K)
        windows.drain()
        windows.check_contents()
        windows.close()
        host.close()


def test_a_refused_copy_raises_at_once(host: Host) -> None:
    windows = WindowRuntime(host, VirtualDevice(0), SLOTS, seed=0)
    windows.device.faults.copies = 3
    with pytest.raises(ValueError, match="refuse"):
        for _ in range(4):
            windows.step(1, TOP_K)
    windows.device.faults.copies = None
    for _ in range(4):
        windows.step(1, TOP_K)
    windows.drain()
    windows.check_contents()
    windows.close()


def test_work_that_fails_ends_all(host: Host) -> None:
    windows = WindowRuntime(host, VirtualDevice(0), SLOTS, seed=0)
    windows.device.faults.operations = 20
    for _ in range(2):
        with pytest.raises(DeviceError, match="failed"):
            for _ in range(40):
                windows.step(1, TOP_K)


def test_too_little_device_memory(host: Host) -> None:
    with pytest.raises(OutOfDeviceMemoryError) as error:
        WindowRuntime(host, VirtualDevice(0, capacity=8 * 4096), SLOTS, seed=0)
    assert error.value.wanted > error.value.free == 8 * 4096


def test_host_memory_that_cannot_be_registered(made: RecordStore) -> None:
    """Records go through a buffer."""
    for order in range(20):
        host = Host(made, slots=LAYERS * EXPERTS)
        device = VirtualDevice(order)
        device.faults.registrations = 1
        windows = WindowRuntime(host, device, SLOTS, seed=order)
        windows.speculate()
        assert "told to refuse" in windows.windows.unregistered and not device.registered
        for rows in (1, 2, 20, 1):
            windows.step(rows, TOP_K)
        windows.drain()
        windows.check_contents()
        windows.close()
        host.close()


def steps(windows: WindowRuntime) -> None:
    for rows in (1, 2, 20, 1, 1):
        windows.step(rows, TOP_K)


@pytest.fixture(scope="module")
def lines(made: RecordStore) -> int:
    """About how many lines of the package the steps execute."""
    host = Host(made, slots=2 * EXPERTS)
    windows = WindowRuntime(host, VirtualDevice(0), SLOTS, seed=0)
    windows.speculate()
    count = lines_of(partial(steps, windows))
    windows.close()
    host.close()
    return count


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 1, exclude_min=True), order=st.integers(0, 1000))
def test_an_exception_at_any_line(made: RecordStore, lines: int, share: float, order: int) -> None:
    host = Host(made, slots=2 * EXPERTS)
    windows = WindowRuntime(host, VirtualDevice(order), SLOTS, seed=0)
    windows.speculate()
    with suppress(KeyboardInterrupt), at_every_line(Raise(KeyboardInterrupt, 1 + int(share * lines))):
        steps(windows)
    windows.runtime.take_failures()
    windows.speculativeer = windows.runtime.prefetcher = None
    steps(windows)
    windows.drain()
    windows.check_contents()
    windows.close()
    host.close()


class Keeper:
    """Host pools in the same memory, one set after the other."""

    def __init__(self, host: Host):
        self._host = host
        self.pools: Mapping[str, HostPool] = host.pools
        self.comes_back = False
        self.reasons: list[str] = []

    def before_exchange(self) -> None:
        raise AssertionError("nobody has registered the memory")

    def begin_step(self) -> bool:
        if self.comes_back:
            self._exchange()
        return self.comes_back

    def fail_over(self, reason: PoolGoneError) -> None:
        self.reasons.append(str(reason))
        self._exchange()

    def _exchange(self) -> None:
        self.before_exchange()
        (old,) = set(self.pools.values())
        old.memory.components[0][:] = 0xAB  # nothing may be on its way out of it
        others = local_pools(self._host.store, {old.layout: old.capacity}, "lfu", None)
        for pool in others.values():
            pool.memory = old.memory
        self.pools = others


@pytest.mark.parametrize("verb", ["hold", "hold_streaming"])
def test_host_pools_that_are_gone(host: Host, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(host)
    windows = WindowRuntime(host, VirtualDevice(1), SLOTS, seed=0, source=keeper)
    windows.speculate()
    steps(windows)
    first = windows.runtime.pools

    def gone(*_: object) -> None:
        raise PoolGoneError("they are gone")

    monkeypatch.setattr(host.pools["layer 0"], verb, gone)
    windows.step(20, TOP_K)
    steps(windows)
    windows.drain()
    windows.check_contents()
    assert keeper.reasons == ["they are gone"] and windows.runtime.pools == first
    assert all(layer.pool.tier.source is keeper.pools["layer 0"] for layer in windows.runtime.layers.values())
    assert windows.device.registered
    keeper.comes_back = True
    steps(windows)
    windows.drain()
    windows.close()
    assert not windows.device.registered
