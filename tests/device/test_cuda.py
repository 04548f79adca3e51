"""What CudaDevice asks of torch and of the runtime, in which order, and what it makes of their errors.

Both are stand-ins here: this says nothing about a GPU. ``test_cuda_device.py`` does, where there is one.
"""

import ctypes
import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_moe_offload.device import DeviceError, OutOfDeviceMemoryError, RegistrationError, cuda
from vllm_moe_offload.device.cuda import CudaDevice
from vllm_moe_offload.device.cuda_runtime import CudaRuntime, RuntimeCallError

PORTABLE_AND_MAPPED, READ_ONLY = 3, 8
OFFSET = 1 << 40
"""Of the device's addresses of registered memory."""


class Library:
    """A runtime whose functions are called through ctypes; each notes its call and returns its next error, if any."""

    def __init__(self, prefix: str = "cuda", read_only: int = 1):
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, int] = {}
        self._prefix, self._read_only = prefix, read_only
        self._text = ctypes.create_string_buffer(b"out of luck")
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        self._functions = {
            "HostRegister": self._function("HostRegister", pointer, size, ctypes.c_uint),
            "HostUnregister": self._function("HostUnregister", pointer),
            "HostGetDevicePointer": self._function("HostGetDevicePointer", pointer, pointer, ctypes.c_uint),
            "MemcpyAsync": self._function("MemcpyAsync", pointer, pointer, size, number, pointer),
            "DeviceGetAttribute": self._function("DeviceGetAttribute", pointer, number, number),
            "GetLastError": self._function("GetLastError"),
            "GetErrorString": ctypes.CFUNCTYPE(pointer, number)(lambda code: ctypes.addressof(self._text)),
        }

    def _function(self, name: str, *arguments: type) -> Callable[..., int]:
        def call(*values: int) -> int:
            self.calls.append((name, *values))
            if code := self.errors.pop(name, 0):
                return code
            if name == "HostGetDevicePointer":
                ctypes.c_void_p.from_address(values[0]).value = values[1] + OFFSET
            elif name == "DeviceGetAttribute":
                ctypes.c_int.from_address(values[0]).value = self._read_only
            elif name == "MemcpyAsync":
                ctypes.memmove(values[0], values[1], values[2])
            return 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(call)

    def __getattr__(self, name: str) -> Callable[..., int]:
        return self._functions[name.removeprefix(self._prefix)]

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


class OnDevice(torch.Tensor):
    """Memory that says that it is the device's."""

    is_cuda = True


class FakeTorch(SimpleNamespace):
    """As much of torch as CudaDevice uses; ``failing`` is raised by every call of its ``cuda``."""

    uint8, Tensor = torch.uint8, torch.Tensor

    def __init__(self, hip: str | None = None):
        self.calls: list[tuple[Any, ...]] = []
        self.failing: Exception | None = None
        calls, call = self.calls, self._call

        class Stream:
            def __init__(self, device: int, priority: int = 0):
                call("stream", device, priority)
                self.cuda_stream = 1000 + len(calls)

            def synchronize(self) -> None:
                call("synchronize stream", self)

            def wait_event(self, event: "Event") -> None:
                call("wait", self, event)

        class Event:
            def __init__(self, enable_timing: bool = False):
                self.timed = enable_timing

            def elapsed_time(self, end: "Event") -> float:
                call("elapsed", self, end)
                return 250.0

            def record(self, stream: Stream) -> None:
                call("record", self, stream)

            def query(self) -> bool:
                call("query", self)
                return True

            def synchronize(self) -> None:
                call("synchronize", self)

        class OutOfMemoryError(RuntimeError):
            pass

        self.current = Stream(1)
        self.version = SimpleNamespace(hip=hip)
        self.cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            OutOfMemoryError=OutOfMemoryError,
            is_available=lambda: True,
            current_device=lambda: 1,
            current_stream=lambda: self.current,
            mem_get_info=lambda device: (77, 100) if device == 1 else (0, 0),
        )
        calls.clear()

    def _call(self, *call: Any) -> None:
        if self.failing is not None:
            raise self.failing
        self.calls.append(call)

    def zeros(self, nbytes: int, dtype: torch.dtype, device: str, pin_memory: bool = False) -> torch.Tensor:
        self._call("zeros", nbytes, dtype, device, pin_memory)
        whole = torch.zeros(nbytes + 256, dtype=dtype)
        memory = whole[-whole.data_ptr() % 256 :][:nbytes]
        return memory if device == "cpu" else memory.as_subclass(OnDevice)


Make = Callable[..., tuple[CudaDevice, FakeTorch, Library]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    def make(hip: bool = False, read_only: int = 1) -> tuple[CudaDevice, FakeTorch, Library]:
        torch_, library = FakeTorch("7.0" if hip else None), Library("hip" if hip else "cuda", read_only)
        monkeypatch.setattr(cuda, "torch", torch_)
        runtime = lambda hip: CudaRuntime(library, "hip" if hip else "cuda")  # noqa: E731
        monkeypatch.setattr(cuda.CudaRuntime, "loaded", runtime)
        return CudaDevice(), torch_, library

    yield make


def host(nbytes: int = 64) -> np.ndarray:
    return np.arange(nbytes, dtype=np.uint8)


def test_device_memory_is_zero_before_any_stream_may_use_it(make: Make) -> None:
    device, torch_, _ = make()
    memory = device.allocate(100)
    assert memory.shape == (100,) and memory.is_cuda and not memory.any()
    assert torch_.calls == [("zeros", 100, torch.uint8, "cuda:1", False), ("synchronize stream", torch_.current)]


def test_too_little_device_memory_is_told_with_its_numbers_and_is_no_failure(make: Make) -> None:
    device, torch_, _ = make()
    torch_.failing = torch_.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfDeviceMemoryError) as refused:
        device.allocate(100)
    assert (refused.value.wanted, refused.value.free) == (100, 77)
    torch_.failing = None
    device.allocate(10)


def test_pinned_memory_may_be_copied_from_and_to(make: Make) -> None:
    device, torch_, library = make()
    memory, pinned = device.allocate(16), device.allocate_pinned(16)
    assert torch_.calls[-1] == ("zeros", 16, torch.uint8, "cpu", True)
    pinned.fill_(7)
    device.copy(device.main, memory, pinned)
    device.copy(device.main, pinned[:4], memory[4:8])
    assert memory.tolist() == [7] * 16
    assert [call[2] for call in library.named("MemcpyAsync")] == [16, 4]


def test_pinned_memory_that_the_driver_refuses_is_no_failure_of_the_device(make: Make) -> None:
    device, torch_, _ = make()
    torch_.failing = RuntimeError("CUDA error: out of memory\nCompile with ...")
    with pytest.raises(RegistrationError, match=r"16 pinned bytes: CUDA error: out of memory$"):
        device.allocate_pinned(16)
    torch_.failing = None
    device.allocate_pinned(16)


def test_pinned_memory_lives_as_long_as_the_device(make: Make) -> None:
    device, _, _ = make()
    pinned = weakref.ref(device.allocate_pinned(16))
    gc.collect()
    assert pinned() is not None


@pytest.mark.parametrize(("hip", "supported", "tried"), [(False, 1, 2), (False, 0, 1), (True, 1, 1)])
def test_memory_is_registered_read_only_where_the_driver_refuses_otherwise_and_the_device_can(
    make: Make, hip: bool, supported: int, tried: int
) -> None:
    device, _, library = make(hip, supported)
    memory, read_only = host(), host()
    device.register(memory)
    library.errors["HostRegister"] = 1
    if tried == 2:
        device.register(read_only)
        assert device.address(read_only) == read_only.ctypes.data + OFFSET
    else:
        with pytest.raises(RegistrationError):
            device.register(read_only)
    assert library.named("HostRegister") == [
        (memory.ctypes.data, 64, PORTABLE_AND_MAPPED),
        *((read_only.ctypes.data, 64, PORTABLE_AND_MAPPED | READ_ONLY * number) for number in range(tried)),
    ]
    assert [call[1:] for call in library.named("DeviceGetAttribute")] == ([] if hip else [(113, 1)])


def test_registered_memory_has_the_devices_address(make: Make) -> None:
    device, _, library = make()
    memory = host()
    device.register(memory)
    assert device.address(memory[8:]) == memory.ctypes.data + 8 + OFFSET
    device.unregister(memory)
    assert library.named("HostUnregister") == [(memory.ctypes.data,)]
    with pytest.raises(AssertionError, match="not registered"):
        device.address(memory)


def test_a_refused_registration_is_told_in_the_drivers_words_and_its_error_cleared(make: Make) -> None:
    device, _, library = make(read_only=0)
    library.errors["HostRegister"] = 2
    with pytest.raises(RegistrationError, match=r"64 bytes .* cudaHostRegister: out of luck \(2\)"):
        device.register(host())
    assert [call[0] for call in library.calls][-2:] == ["HostRegister", "GetLastError"]
    device.register(host())


@pytest.mark.parametrize("unregister_fails", [False, True])
def test_memory_without_an_address_is_not_left_registered(make: Make, unregister_fails: bool) -> None:
    device, _, library = make()
    library.errors |= {"HostGetDevicePointer": 1} | ({"HostUnregister": 1} if unregister_fails else {})
    memory = host()
    with pytest.raises(RegistrationError, match="no address"):
        device.register(memory)
    assert library.named("HostUnregister") == [(memory.ctypes.data,)]
    with pytest.raises(ValueError, match="not registered"):
        device.copy(device.main, device.allocate(64), torch.from_numpy(memory))


def test_memory_that_cannot_be_unregistered_ends_the_device(make: Make) -> None:
    device, _, library = make()
    memory = host()
    device.register(memory)
    library.errors["HostUnregister"] = 719
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"out of luck \(719\)"):
            device.unregister(memory)


def test_a_copy_goes_to_its_stream_and_that_of_main_to_the_current_one(make: Make) -> None:
    device, torch_, library = make()
    memory, rows = host(), device.allocate(64)
    device.register(memory)
    copies = device.stream("copies", urgent=True)
    assert (
        torch_.calls[-1] == ("stream", 1, -1)
        and device.stream("speculative loads")
        and torch_.calls[-1] == ("stream", 1, 0)
    )
    device.copy(copies, rows[:8], torch.from_numpy(memory[8:16]))
    assert library.calls[-1] == (
        "MemcpyAsync", rows.data_ptr(), memory.ctypes.data + 8, 8, 4, copies.stream.cuda_stream
    )  # fmt: skip
    for _ in range(2):
        torch_.current = torch_.cuda.Stream(1)
        device.copy(device.main, torch.from_numpy(memory[:8]), rows[:8])
        assert library.calls[-1][-1] == torch_.current.cuda_stream
    assert memory[:8].tolist() == list(range(8, 16))


def test_a_copy_that_cannot_be_made_as_asked_is_refused(make: Make) -> None:
    device, _, library = make()
    memory, rows = host(), device.allocate(64)
    device.register(memory[:32])
    source = torch.from_numpy(memory)
    for wrong in (source[:5], source[:8].view(torch.int8), source[:16:2], source[:8].view(2, 4), source[28:36]):
        with pytest.raises(ValueError, match="bytes"):
            device.copy(device.main, rows[:8], wrong)
    with pytest.raises(ValueError, match="not registered"):
        device.copy(device.main, source[40:48], rows[:8])
    assert not library.named("MemcpyAsync")


def test_events_are_recorded_and_waited_for_on_the_streams_asked(make: Make) -> None:
    device, torch_, _ = make()
    copies = device.stream("copies")
    event = device.record(copies)
    device.wait(device.main, event)
    assert device.finished(event)
    device.synchronize(event)
    assert torch_.calls[1:] == [
        ("record", event, copies.stream),
        ("wait", torch_.current, event),
        ("query", event),
        ("synchronize", event),
    ]


def test_the_time_between_timestamps_is_in_seconds(make: Make) -> None:
    device, torch_, _ = make()
    begin: Any = device.timestamp(device.main)
    end: Any = device.timestamp(device.main)
    plain: Any = device.record(device.main)
    assert begin.timed and end.timed and not plain.timed
    assert device.seconds(begin, end) == 0.25
    assert torch_.calls[-1] == ("elapsed", begin, end)


def calls_of(device: CudaDevice) -> list[Callable[[], object]]:
    event, copies = device.timestamp(device.main), device.stream("copies")
    memory, rows = host(), device.allocate(64)
    device.register(memory)
    return [
        lambda: device.synchronize(event),
        lambda: device.finished(event),
        lambda: device.wait(copies, event),
        lambda: device.record(copies),
        lambda: device.stream("other"),
        lambda: device.allocate(1),
        lambda: device.copy(copies, rows, torch.from_numpy(memory)),
        lambda: device.allocate_pinned(1),
        lambda: device.register(host()),
        lambda: device.unregister(memory),
        lambda: device.timestamp(copies),
        lambda: device.seconds(event, event),
    ]


@pytest.mark.parametrize("first", range(6))
def test_an_error_of_torch_ends_the_device_and_names_what_was_enqueued_last(make: Make, first: int) -> None:
    device, torch_, _ = make()
    pinned, rows = device.allocate_pinned(4), device.allocate(4)
    calls = calls_of(device)
    device.copy(device.stream("loads"), rows, pinned)
    torch_.failing = RuntimeError("CUDA error: an illegal memory access\nCompile with ...")
    with pytest.raises(DeviceError, match=r"illegal memory access; enqueued last: a copy of 4 bytes on loads$"):
        calls[first]()
    torch_.failing = None
    for call in calls:
        with pytest.raises(DeviceError, match="illegal memory access"):
            call()


def test_a_copy_that_the_driver_refuses_ends_the_device(make: Make) -> None:
    device, _, library = make()
    calls = calls_of(device)
    library.errors["MemcpyAsync"] = 1
    with pytest.raises(DeviceError, match=r"a copy of 64 bytes on copies was refused: cudaMemcpyAsync: out of luck"):
        calls[6]()
    for call in calls:
        with pytest.raises(DeviceError, match="was refused"):
            call()


def test_a_device_whose_attributes_cannot_be_asked_for_is_not_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    library = Library()
    library.errors["DeviceGetAttribute"] = 35
    monkeypatch.setattr(cuda.CudaRuntime, "loaded", lambda hip: CudaRuntime(library, "cuda"))
    with pytest.raises(DeviceError, match="out of luck"):
        CudaDevice()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_device() -> None:
    with pytest.raises(DeviceError, match="sees no GPU"):
        CudaDevice()
    for hip, name in ((False, "libcudart"), (True, "libamdhip64")):
        with pytest.raises(DeviceError, match=name):
            CudaRuntime.loaded(hip)


CUDART = next(iter(sorted(Path("/usr/local").glob("cuda*/lib64/libcudart.so.*"))), None)

ASK_REAL_RUNTIME = """
import ctypes, sys
from vllm_moe_offload.device.cuda_runtime import CudaRuntime, RuntimeCallError
ctypes.CDLL(sys.argv[1])
runtime = CudaRuntime.loaded(hip=False)
for call in (lambda: runtime.host_unregister(4096), lambda: runtime.device_address(4096)):
    try:
        call()
    except RuntimeCallError as error:
        print(error)
"""


@pytest.mark.skipif(CUDART is None, reason="no CUDA runtime is installed")
def test_the_loaded_runtime_is_found_and_says_its_errors_in_words(tmp_path: Path) -> None:
    assert CUDART is not None
    library = tmp_path / "with a blank" / CUDART.name
    library.parent.mkdir()
    shutil.copy(CUDART, library)
    said = subprocess.run(
        [sys.executable, "-c", ASK_REAL_RUNTIME, str(library)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(said) == 2 and said[0].startswith("cudaHostUnregister: ") and said[1].startswith("cudaHostGetDevice")
    assert all(line.rstrip(")").rpartition("(")[2].isdigit() and len(line) > 40 for line in said)


def test_every_call_of_the_runtime_raises_unless_it_succeeds() -> None:
    library = Library("hip")
    runtime = CudaRuntime(library, "hip")
    calls = {
        "HostRegister": lambda: runtime.host_register(4096, 1, 0),
        "HostUnregister": lambda: runtime.host_unregister(4096),
        "HostGetDevicePointer": lambda: runtime.device_address(4096),
        "MemcpyAsync": lambda: runtime.copy(4096, 8192, 1, 0),
    }
    for name, call in calls.items():
        library.errors[name] = 9
        with pytest.raises(RuntimeCallError, match=rf"hip{name}: out of luck \(9\)"):
            call()
        assert library.calls[-1] == ("GetLastError",)
