"""The virtual device keeps the contract of a device, and shows every error put into protocols of streams and events."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.device.protocols import BUGS, Protocol
from tests.device.virtual import POISON, CorruptionError, Memory, VirtualDevice
from vllm_moe_offload.device import DeviceError, OutOfDeviceMemoryError, RegistrationError

ORDERS = 1000 // len(BUGS)


def shown(protocol: Protocol, bug: str | None, orders: int) -> bool:
    for order in range(orders):
        try:
            protocol(order, bug)
        except CorruptionError:
            return True
    return False


@pytest.mark.parametrize("protocol", BUGS, ids=lambda protocol: protocol.__name__)
def test_a_protocol_without_an_error_is_right_in_every_order(
    protocol: Protocol, request: pytest.FixtureRequest
) -> None:
    assert not shown(protocol, None, ORDERS if not request.config.option.exhaustive else 10 * ORDERS)


@pytest.mark.parametrize(("protocol", "bug"), [(protocol, bug) for protocol, bugs in BUGS.items() for bug in bugs])
def test_some_order_shows_an_error(protocol: Protocol, bug: str) -> None:
    assert shown(protocol, bug, ORDERS)


def registered(device: VirtualDevice, *values: int) -> torch.Tensor:
    """Host memory ``[len(values), 4]`` that copies may read."""
    memory = np.repeat(np.array(values, dtype=np.uint8), 4).reshape(-1, 4)
    device.register(memory)
    return torch.from_numpy(memory)


def note(done: list[object], name: object) -> Callable[[list[Memory]], None]:
    """What a kernel computes that only says that it has ended."""
    return lambda _: done.append(name)


@pytest.fixture
def lazy() -> VirtualDevice:
    """Nothing runs before it is waited for."""
    return VirtualDevice(chance_to_run=0)


def test_memory_is_aligned_and_zero() -> None:
    device = VirtualDevice()
    for nbytes in (1, 255, 1000):
        for memory in (device.allocate(nbytes), device.allocate_pinned(nbytes)):
            assert memory.shape == (nbytes,) and memory.dtype == torch.uint8
            assert memory.data_ptr() % 256 == 0 and not memory.any()


def test_a_copy_is_made_when_it_is_waited_for(lazy: VirtualDevice) -> None:
    target, source = lazy.allocate(4), registered(lazy, 7)[0]
    lazy.copy(lazy.main, target, source)
    event = lazy.record(lazy.main)
    assert not lazy.finished(event) and not target.any()
    lazy.synchronize(event)
    assert lazy.finished(event) and target.tolist() == [7] * 4


def test_an_event_is_finished_at_some_time_without_being_waited_for() -> None:
    device = VirtualDevice()
    device.copy(device.main, device.allocate(4), registered(device, 7)[0])
    event = device.record(device.main)
    assert any(device.finished(event) for _ in range(10_000))


def test_an_event_of_an_empty_stream_is_finished(lazy: VirtualDevice) -> None:
    assert lazy.finished(lazy.record(lazy.stream("empty")))


def test_the_target_of_a_copy_under_way_holds_poison() -> None:
    device = VirtualDevice(main_is_host=True)
    target, source = device.allocate(4), registered(device, 7)[0]
    seen = set()
    for _ in range(200):
        target.zero_()
        device.copy(device.stream("copies"), target, source)
        while device.pending:
            seen.add(tuple(target.tolist()))
            device._step(forced=True)
    assert (POISON,) * 4 in seen


def test_work_of_a_stream_is_done_in_the_order_enqueued() -> None:
    for order in range(20):
        device, done = VirtualDevice(order), []
        for number in range(10):
            device.kernel(device.main, lambda: [], note(done, number))
        device.drain()
        assert done == list(range(10))


def test_work_waits_for_events_and_only_work_enqueued_afterwards() -> None:
    first_of = set()
    for order in range(50):
        device, done = VirtualDevice(order), []
        other = device.stream("other")
        device.kernel(device.main, lambda: [], note(done, "before"))
        device.kernel(other, lambda: [], note(done, "awaited"))
        device.wait(device.main, device.record(other))
        device.kernel(device.main, lambda: [], note(done, "after"))
        device.drain()
        assert done.index("after") > done.index("awaited")
        first_of.add(done[0])
    assert first_of == {"before", "awaited"}


def test_a_frozen_operation_runs_last_unless_it_is_waited_for() -> None:
    for order in range(20):
        device, done = VirtualDevice(order, frozen=0), []
        streams = [device.stream(str(number)) for number in range(3)]
        for number, stream in enumerate(streams):
            device.kernel(stream, lambda: [], note(done, number))
        device.drain()
        assert done[-1] == 0
        device.synchronize(device.record(streams[0]))


def test_on_a_host_main_work_of_main_is_done_at_once_and_a_wait_runs_what_the_event_needs() -> None:
    for order in range(50):
        device = VirtualDevice(order, main_is_host=True, chance_to_run=0)
        records = registered(device, 1, 2, 3)
        targets = [device.allocate(4) for _ in range(3)]
        copies, others = device.stream("copies"), device.stream("others")
        device.copy(device.main, targets[0], records[0])
        assert targets[0].tolist() == [1] * 4 and device.finished(device.record(device.main))
        device.copy(copies, targets[1], records[1])
        needed = device.record(copies)
        device.copy(copies, targets[1], records[0])
        device.copy(others, targets[2], records[2])
        device.wait(device.main, needed)
        assert targets[1].tolist() == [2] * 4 and not targets[2].any() and device.pending == 2


def test_a_source_that_changes_while_it_is_copied_is_noticed() -> None:
    for order in range(50):
        device = VirtualDevice(order)
        source = registered(device, 1)[0]
        device.copy(device.main, device.allocate(4), source)
        device._step(forced=True)
        source.fill_(2)
        with pytest.raises(CorruptionError, match="read memory while it was written"):
            device.drain()


def test_two_writers_of_the_same_memory_are_noticed() -> None:
    def noticed(order: int) -> bool:
        device = VirtualDevice(order)
        records, target = registered(device, 1, 2), device.allocate(4)
        device.copy(device.stream("one"), target, records[0])
        device.copy(device.stream("two"), target, records[1])
        try:
            device.drain()
        except CorruptionError as error:
            return "something else wrote" in str(error)
        return False

    assert any(noticed(order) for order in range(100))


def test_memory_unregistered_before_its_copy_is_made_is_noticed(lazy: VirtualDevice) -> None:
    source = registered(lazy, 1)
    lazy.copy(lazy.main, lazy.allocate(4), source[0])
    lazy.unregister(source.numpy())
    with pytest.raises(CorruptionError, match="unregistered"):
        lazy.drain()


def test_a_copy_that_cannot_be_made_as_asked_is_refused() -> None:
    device = VirtualDevice()
    target, source = device.allocate(4), registered(device, 1)[0]
    for wrong in (source[:3], source.view(torch.int8), source[::2], torch.zeros(4, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="byte"):
            device.copy(device.main, target, wrong)
    with pytest.raises(ValueError, match="not registered"):
        device.copy(device.main, torch.zeros(4, dtype=torch.uint8), source)
    assert device.enqueued == 0


def test_registered_memory_has_an_address_and_is_registered_once() -> None:
    for scattered in (False, True):
        device = VirtualDevice(scattered=scattered)
        memory = np.zeros((4, 8), dtype=np.uint8)
        device.register(memory)
        assert device.address(memory[2]) - device.address(memory) == 16
        assert (device.address(memory) == memory.ctypes.data) != scattered
        with pytest.raises(RegistrationError, match="already"):
            device.register(memory[1:])
        device.unregister(memory)
        device.register(memory[1:])


def test_memory_is_refused_where_the_device_has_no_more() -> None:
    device = VirtualDevice(capacity=100)
    device.allocate(60)
    with pytest.raises(OutOfDeviceMemoryError) as refused:
        device.allocate(50)
    assert (refused.value.wanted, refused.value.free) == (50, 40)


def test_faults_come_when_they_are_due_and_once() -> None:
    device = VirtualDevice()
    target, source = device.allocate(4), registered(device, 1)[0]
    device.faults.copies, device.faults.allocations, device.faults.registrations = 1, 0, 1
    device.copy(device.main, target, source)
    with pytest.raises(ValueError, match="refuse"):
        device.copy(device.main, target, source)
    device.copy(device.main, target, source)
    with pytest.raises(OutOfDeviceMemoryError):
        device.allocate(1)
    device.allocate(1)
    registered(device, 2)
    with pytest.raises(RegistrationError):
        registered(device, 3)
    device.faults.registrations = 0
    with pytest.raises(RegistrationError):
        device.allocate_pinned(1)


def test_a_device_that_has_failed_does_nothing_any_more() -> None:
    device = VirtualDevice()
    target, source = device.allocate(4), registered(device, 1)[0]
    event = device.record(device.main)
    device.faults.operations = 0
    device.copy(device.main, target, source)
    for call in (device.drain, lambda: device.finished(event), lambda: device.synchronize(event)):
        with pytest.raises(DeviceError, match="copy on main failed"):
            call()
    with pytest.raises(DeviceError):
        device.allocate(1)
    assert not target.any()
