"""CudaDevice on a GPU. Needs torch, no vLLM; skipped where torch sees no GPU."""

import mmap
import os
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from vllm_moe_offload.device import (  # noqa: E402
    Copy,
    OutOfDeviceMemoryError,
    RegisteredMemory,
    RegistrationError,
    TransferQueue,
)
from vllm_moe_offload.device.cuda import CudaDevice  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

TENTH_OF_A_SECOND = 200_000_000
"""Clock cycles, more or less."""


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice()


def pages(slots: int, nbytes: int) -> np.ndarray:
    """``[slots, nbytes]`` random bytes that start on a page."""
    memory = np.frombuffer(mmap.mmap(-1, slots * nbytes), dtype=np.uint8).reshape(slots, nbytes)
    memory[:] = np.random.default_rng(slots).integers(0, 256, memory.shape, dtype=np.uint8)
    return memory


def test_device_memory_is_zero_aligned_and_counted_by_torch(device: CudaDevice) -> None:
    torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_allocated()
    memory = device.allocate(1_000_001)
    assert memory.shape == (1_000_001,) and memory.data_ptr() % 256 == 0 and not memory.any()
    assert torch.cuda.memory_allocated() - before >= 1_000_001


def test_more_memory_than_there_is_is_refused_and_less_is_not(device: CudaDevice) -> None:
    free, total = torch.cuda.mem_get_info()
    with pytest.raises(OutOfDeviceMemoryError) as refused:
        device.allocate(2 * total)
    assert refused.value.wanted == 2 * total and 0 < refused.value.free <= total
    device.allocate(free // 1000)


def test_bytes_come_back_as_they_went(device: CudaDevice) -> None:
    memory, back = pages(3, 5000), pages(2, 7500)
    for part in (memory, back):
        device.register(part)
    rows, copies = device.allocate(memory.size), device.stream("copies")
    device.copy(copies, rows, torch.from_numpy(memory).view(-1))
    device.wait(device.main, device.record(copies))
    device.copy(device.main, torch.from_numpy(back).view(-1), rows)
    device.synchronize(device.record(device.main))
    assert np.array_equal(memory.reshape(-1), back.reshape(-1))
    for part in (memory, back):
        device.unregister(part)


def test_pinned_memory_brings_a_few_bytes_to_the_host(device: CudaDevice) -> None:
    pinned, numbers = device.allocate_pinned(32), torch.arange(32, dtype=torch.uint8, device="cuda")
    assert pinned.is_pinned()
    device.copy(device.main, pinned, numbers)
    device.synchronize(device.record(device.main))
    assert pinned.tolist() == list(range(32))


def test_nothing_is_done_before_what_it_waits_for(device: CudaDevice) -> None:
    source, target = device.allocate_pinned(1 << 20), device.allocate(1 << 20)
    source.fill_(2)
    copies = device.stream("copies", urgent=True)
    torch.cuda._sleep(TENTH_OF_A_SECOND)
    target.fill_(1)
    device.wait(copies, device.record(device.main))
    device.copy(copies, target, source)
    event = device.record(copies)
    assert not device.finished(event)
    device.synchronize(event)
    assert device.finished(event) and bool((target == 2).all())


def test_a_stream_does_not_wait_for_another_unless_told(device: CudaDevice) -> None:
    source, target = device.allocate_pinned(8), device.allocate(8)
    copies = device.stream("copies")
    torch.cuda._sleep(2 * TENTH_OF_A_SECOND)
    behind = device.record(device.main)
    device.copy(copies, target, source)
    device.synchronize(device.record(copies))
    assert not device.finished(behind)
    device.synchronize(behind)


def test_timestamps_tell_what_kernels_take(device: CudaDevice) -> None:
    begin = device.timestamp(device.main)
    torch.cuda._sleep(2 * TENTH_OF_A_SECOND)
    end = device.timestamp(device.main)
    device.synchronize(end)
    assert 0.05 < device.seconds(begin, end) < 2


def test_main_is_the_current_stream_and_an_urgent_stream_has_priority(device: CudaDevice) -> None:
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        torch.cuda._sleep(TENTH_OF_A_SECOND)
        event = device.record(device.main)
    device.synchronize(device.record(device.main))
    assert not device.finished(event)
    device.synchronize(event)
    assert device.stream("a", urgent=True).stream.priority < device.stream("b").stream.priority


def test_a_component_in_several_chunks_lies_at_one_address_and_copies_slot_by_slot(device: CudaDevice) -> None:
    memory = pages(9, 3 * 4096)
    registered = RegisteredMemory(device, [memory], chunk_bytes=2 * 3 * 4096)
    assert registered.address(0) == device.address(memory[0])
    rows, copies = device.allocate(memory.size).view(memory.shape), device.stream("copies")
    for slot in range(9):
        device.copy(copies, rows[slot], torch.from_numpy(memory[slot]))
    device.synchronize(device.record(copies))
    assert np.array_equal(rows.cpu().numpy(), memory)
    registered.close()
    with pytest.raises(ValueError, match="not registered"):
        device.copy(copies, rows[0], torch.from_numpy(memory[0]))


def test_the_device_reads_registered_memory_at_its_address(device: CudaDevice) -> None:
    memory = pages(1, 1 << 20)
    device.register(memory)
    rows = device.allocate(memory.size)
    device._runtime.copy(rows.data_ptr(), device.address(memory), memory.nbytes, device.main.stream.cuda_stream)
    assert np.array_equal(rows.cpu().numpy(), memory[0])
    device.unregister(memory)


def test_memory_mapped_read_only_is_registered_where_the_device_can(device: CudaDevice) -> None:
    file = os.memfd_create("records")
    os.write(file, bytes(range(256)) * 64)
    memory = np.frombuffer(mmap.mmap(file, 64 * 256, prot=mmap.PROT_READ), dtype=np.uint8)
    rows = device.allocate(memory.size)
    try:
        device.register(memory)
    except RegistrationError as error:
        assert not device._read_only, "a device that can register read-only memory refused it"
        print("memory mapped read-only is refused:", error)
        return
    device.copy(device.main, rows, torch.from_numpy(memory))
    assert rows.cpu().tolist() == list(range(256)) * 64
    device.unregister(memory)


def test_a_refused_registration_leaves_no_error_behind(device: CudaDevice) -> None:
    memory = pages(1, 4096)
    device.register(memory)
    with pytest.raises(RegistrationError, match="already"):
        device.register(memory)
    assert torch.ones(1, device="cuda").item() == 1.0
    device.unregister(memory)


def test_demands_and_speculative_loads_arrive(device: CudaDevice) -> None:
    memory = pages(4, 5 << 20)
    device.register(memory)
    rows, queue = device.allocate(memory.size).view(memory.shape), TransferQueue(device)

    def copy(record: int) -> Copy:
        return Copy(rows[record], torch.from_numpy(memory[record]), device.record(device.main))

    speculation = [queue.speculate([copy(0)]), queue.speculate([copy(1)])]
    device.wait(device.main, queue.demand([copy(2), copy(3)]))
    assert np.array_equal(rows[2:].cpu().numpy(), memory[2:])
    while not queue.settled(speculation[0]):
        queue.pump()
    device.synchronize(queue.promote(speculation[1]))
    assert np.array_equal(rows.cpu().numpy(), memory)
    assert queue.demanded_bytes + queue.speculative_bytes == memory.nbytes
    device.unregister(memory)


PREPARE = """
import os, sys, torch
from vllm_moe_offload.device import DeviceError
from vllm_moe_offload.device.cuda import CudaDevice
from vllm_moe_offload.device.cuda_runtime import RuntimeCallError

device = CudaDevice()
pinned, rows = device.allocate_pinned(8), device.allocate(8)
device.copy(device.main, rows, pinned)
"""

FAIL = """
torch.zeros(1, device="cuda").index_select(0, torch.tensor([5], device="cuda"))
event = torch.cuda.Event()
calls = (
    lambda: device.synchronize(device.record(device.main)),
    lambda: device.finished(event),
    lambda: device.allocate(1),
)
for call in calls:
    try:
        call()
    except DeviceError as error:
        print(error)
"""

COPY_TOO_MUCH = """
try:
    device._runtime.copy(rows.data_ptr(), rows.data_ptr() + 8, 1 << 44, device.main.stream.cuda_stream)
except RuntimeCallError as error:
    print(error)
print(torch.ones(1, device="cuda").item())
"""


def lines_of(code: str) -> list[str]:
    """What a process of its own prints, whose GPU may be of no use any more at the end."""
    end = "sys.stdout.flush(); os._exit(0)"
    command = [sys.executable, "-c", PREPARE + code + end]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_work_that_fails_ends_the_device() -> None:
    failures = [line for line in lines_of(FAIL) if line.endswith("enqueued last: a copy of 8 bytes on main")]
    assert len(failures) == 3 and len(set(failures)) == 1


def test_a_copy_beyond_what_was_allocated_is_refused_when_it_is_enqueued() -> None:
    refused, after = lines_of(COPY_TOO_MUCH)
    assert "MemcpyAsync: " in refused and after == "1.0"
