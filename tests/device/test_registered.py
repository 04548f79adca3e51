"""All components of a pool's slots are registered or none, in chunks that cut no slot."""

import mmap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device import RegisteredMemory, RegistrationError


def pages(slots: int, nbytes: int) -> np.ndarray:
    """``[slots, nbytes]`` that starts on a page."""
    memory = mmap.mmap(-1, max(slots * nbytes, 1))
    return np.frombuffer(memory, dtype=np.uint8, count=slots * nbytes).reshape(slots, nbytes)


SIZES = st.tuples(st.integers(1, 40), st.sampled_from([1, 24, 256, 768, 1024, 4096, 5120, 3 * 4096]))


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), st.sampled_from([1, 512, 4096, 20_000, 1 << 30]))
def test_chunks_cover_the_memory_and_cut_no_slot(sizes: list[tuple[int, int]], chunk_bytes: int) -> None:
    device = VirtualDevice()
    arrays = [pages(slots, nbytes) for slots, nbytes in sizes]
    memory = RegisteredMemory(device, arrays, chunk_bytes)
    for number, array in enumerate(arrays):
        for slot in array:
            assert device.address(slot) == slot.ctypes.data
        assert memory.address(number) == array.ctypes.data
    assert sum(part.nbytes for part in device.registered.values()) == sum(array.nbytes for array in arrays)
    slot_bytes = {array.ctypes.data: array.shape[1] for array in arrays}
    for address, part in device.registered.items():
        of = max(start for start in slot_bytes if start <= address)
        assert part.nbytes <= max(chunk_bytes, slot_bytes[of])
        whole_pages = mmap.PAGESIZE // np.gcd(slot_bytes[of], mmap.PAGESIZE)
        if chunk_bytes >= whole_pages * slot_bytes[of]:
            assert address % mmap.PAGESIZE == 0
    memory.close()
    assert not device.registered


@settings(max_examples=50, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3), st.integers(0, 60))
def test_nothing_stays_registered_where_the_driver_refuses_a_chunk(sizes: list[tuple[int, int]], refused: int) -> None:
    device = VirtualDevice()
    device.faults.registrations = refused
    try:
        memory = RegisteredMemory(device, [pages(slots, nbytes) for slots, nbytes in sizes], 4096)
    except RegistrationError:
        assert not device.registered and device.faults.registrations is None
    else:
        assert 0 < len(device.registered) <= refused
        memory.close()


def test_few_chunks_are_made_of_large_memory() -> None:
    device = VirtualDevice()
    RegisteredMemory(device, [pages(100, 4096)], 33 * 4096)
    assert [part.nbytes // 4096 for part in device.registered.values()] == [33, 33, 33, 1]


def test_an_empty_component_takes_no_call() -> None:
    device = VirtualDevice()
    memory = RegisteredMemory(device, [pages(0, 16), pages(2, 16)])
    assert len(device.registered) == 1
    memory.close()


def test_chunks_that_the_device_sees_apart_have_no_common_address() -> None:
    device = VirtualDevice(scattered=True)
    whole, cut = pages(4, 4096), pages(4, 4096)
    memory = RegisteredMemory(device, [whole], 4 * 4096)
    assert memory.address(0) == device.address(whole)
    with pytest.raises(RegistrationError, match="apart"):
        RegisteredMemory(device, [cut], 4096).address(0)


def test_what_is_registered_is_unregistered_in_the_opposite_order_and_once() -> None:
    class Noting(VirtualDevice):
        def unregister(self, memory: np.ndarray) -> None:
            super().unregister(memory)
            order.append(memory.ctypes.data)

    order: list[int] = []
    device, array = Noting(), pages(3, 4096)
    memory = RegisteredMemory(device, [array], 4096)
    memory.close()
    memory.close()
    assert order == [array.ctypes.data + 4096 * chunk for chunk in (2, 1, 0)]


def test_copies_read_slots_of_registered_memory() -> None:
    device, array = VirtualDevice(), pages(5, 4096)
    array[:] = np.arange(1, 6)[:, None]
    RegisteredMemory(device, [array], 2 * 4096)
    rows = device.allocate(array.size).view(array.shape)
    for slot in range(5):
        device.copy(device.main, rows[slot], torch.from_numpy(array[slot]))
    with pytest.raises(ValueError, match="not registered"):
        device.copy(device.main, rows.view(-1)[: 3 * 4096], torch.from_numpy(array).view(-1)[: 3 * 4096])
    device.drain()
    assert torch.equal(rows, torch.from_numpy(array))


@settings(max_examples=100, deadline=None)
@given(SIZES, st.sampled_from([1, 4096, 20_000, 1 << 30]), st.data())
def test_parts_of_slots_lie_in_one_chunk_each(size: tuple[int, int], chunk_bytes: int, data: st.DataObject) -> None:
    device = VirtualDevice()
    array = pages(*size)
    array[:] = np.arange(size[0])[:, None] % 251
    first = data.draw(st.integers(0, size[0] - 1))
    last = data.draw(st.integers(first + 1, size[0]))
    parts = RegisteredMemory(device, [array], chunk_bytes).parts(0, range(first, last))
    assert (np.concatenate(parts) == array[first:last]).all()
    assert all(device.address(part) == part.ctypes.data for part in parts)


def test_a_component_without_bytes_is_left_alone() -> None:
    """Kernels are shown tensors without elements for what a checkpoint does not have."""
    device = VirtualDevice()
    arrays = [pages(4, 4096), np.empty((4, 0), np.uint8)]
    memory = RegisteredMemory(device, arrays)
    assert sum(part.nbytes for part in device.registered.values()) == arrays[0].nbytes
    assert memory.address(1) == 0 and memory.parts(1, range(1, 3)) == []
    memory.close()
    assert not device.registered
