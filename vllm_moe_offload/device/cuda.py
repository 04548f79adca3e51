"""A GPU that torch calls ``cuda``: NVIDIA's or, through HIP, AMD's."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from .base import Device, DeviceError, Event, OutOfDeviceMemoryError, RegistrationError, Stream
from .cuda_runtime import MAPPED, PORTABLE, READ_ONLY, CudaRuntime, RuntimeCallError
from .ranges import AddressRanges

_URGENT = -1


class CudaStream:
    """A stream of torch; without one that on which torch's kernels of this thread run at the time."""

    __slots__ = ("_stream", "name")

    def __init__(self, name: str, stream: "torch.cuda.Stream | None" = None):
        self.name = name
        self._stream = stream

    @property
    def stream(self) -> "torch.cuda.Stream":
        return torch.cuda.current_stream() if self._stream is None else self._stream


class CudaDevice(Device):
    """The GPU that is torch's current one in the thread that makes it.

    Raises:
        DeviceError: there is none, or its runtime is not a library of its own.
    """

    main: CudaStream

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise DeviceError("torch sees no GPU")
        self._failure: str | None = None
        self._latest = "nothing"
        """What was enqueued last."""
        self.index = torch.cuda.current_device()
        self.main = CudaStream("main")
        self._runtime = CudaRuntime.loaded(hip=torch.version.hip is not None)
        with self._calling("the query of attributes"):
            self._read_only = self._runtime.registers_read_only(self.index)
        self._host = AddressRanges()
        self._pinned: list[torch.Tensor] = []
        """Never given back: their addresses stay in ``_host``."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self._calling(f"the allocation of {nbytes} bytes"):
            try:
                memory = torch.zeros(nbytes, dtype=torch.uint8, device=f"cuda:{self.index}")
            except torch.cuda.OutOfMemoryError as error:
                raise OutOfDeviceMemoryError(nbytes, torch.cuda.mem_get_info(self.index)[0]) from error
            torch.cuda.current_stream().synchronize()
        assert memory.data_ptr() % 256 == 0, "torch allocates on multiples of 512"
        return memory

    def allocate_pinned(self, nbytes: int) -> torch.Tensor:
        self._check()
        try:
            memory = torch.zeros(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise RegistrationError(f"there are no {nbytes} pinned bytes: {_first_line(error)}") from error
        self._pinned.append(memory)
        self._host.add(memory.data_ptr(), nbytes, memory.data_ptr())
        return memory

    def register(self, memory: NDArray[np.uint8]) -> None:
        assert memory.flags.c_contiguous and memory.nbytes, "contiguous memory is registered"
        self._check()
        start, nbytes = memory.ctypes.data, memory.nbytes
        try:
            self._host_register(start, nbytes)
        except RuntimeCallError as error:
            raise RegistrationError(f"{nbytes} bytes of host memory could not be registered: {error}") from error
        try:
            self._host.add(start, nbytes, self._runtime.device_address(start))
        except RuntimeCallError as error:
            with suppress(RuntimeCallError):
                self._runtime.host_unregister(start)
            raise RegistrationError(f"{nbytes} registered bytes have no address on the device: {error}") from error

    def unregister(self, memory: NDArray[np.uint8]) -> None:
        self._check()
        self._host.remove(memory.ctypes.data, memory.nbytes)
        try:
            self._runtime.host_unregister(memory.ctypes.data)
        except RuntimeCallError as error:
            self._fail(f"memory could not be unregistered: {error}", error)

    def address(self, memory: NDArray[np.uint8]) -> int:
        address = self._host.address(memory.ctypes.data, memory.nbytes)
        assert address is not None, "the memory is not registered, or not in one piece"
        return address

    def stream(self, name: str, urgent: bool = False) -> CudaStream:
        with self._calling("the creation of a stream"):
            return CudaStream(name, torch.cuda.Stream(self.index, priority=_URGENT if urgent else 0))

    def copy(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        assert isinstance(stream, CudaStream)
        nbytes = target.nbytes
        if source.nbytes != nbytes:
            raise ValueError(f"{source.nbytes} bytes are copied to {nbytes}")
        self._check()
        to, of = self._place(target), self._place(source)
        self._latest = f"a copy of {nbytes} bytes on {stream.name}"
        try:
            self._runtime.copy(to, of, nbytes, stream.stream.cuda_stream)
        except RuntimeCallError as error:
            self._fail(f"{self._latest} was refused: {error}", error)

    def record(self, stream: Stream) -> Event:
        return self._event(stream, timed=False)

    def timestamp(self, stream: Stream) -> Event:
        return self._event(stream, timed=True)

    def seconds(self, begin: Event, end: Event) -> float:
        assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        with self._calling("the time between two events"):
            return begin.elapsed_time(end) / 1e3

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(stream, CudaStream) and isinstance(event, torch.cuda.Event)
        with self._calling("a wait for an event"):
            stream.stream.wait_event(event)

    def finished(self, event: Event) -> bool:
        assert isinstance(event, torch.cuda.Event)
        with self._calling("the query of an event"):
            return event.query()

    def synchronize(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        with self._calling("the wait for an event"):
            event.synchronize()

    def _event(self, stream: Stream, timed: bool) -> Event:
        assert isinstance(stream, CudaStream)
        with self._calling("an event"):
            event = torch.cuda.Event(enable_timing=timed)
            event.record(stream.stream)
            return event

    def _host_register(self, start: int, nbytes: int) -> None:
        """Read-only where the driver refuses otherwise: an array does not tell how its memory is mapped."""
        try:
            self._runtime.host_register(start, nbytes, PORTABLE | MAPPED)
        except RuntimeCallError:
            if not self._read_only:
                raise
            self._runtime.host_register(start, nbytes, PORTABLE | MAPPED | READ_ONLY)

    def _place(self, memory: torch.Tensor) -> int:
        """The address at which the driver finds ``memory``, which may be copied."""
        if memory.dtype != torch.uint8 or memory.ndim != 1 or not memory.is_contiguous():
            raise ValueError(f"a copy is of contiguous bytes, not {memory.dtype} {tuple(memory.shape)}")
        address = memory.data_ptr()
        if not memory.is_cuda and self._host.address(address, memory.nbytes) is None:
            raise ValueError(f"{memory.nbytes} bytes on the host are not registered, or not in one piece")
        return address

    def _check(self) -> None:
        if self._failure is not None:
            raise DeviceError(self._failure)

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Calls of torch and the runtime; what they raise is the device's failure."""
        self._check()
        try:
            yield
        except (RuntimeError, RuntimeCallError) as error:
            self._fail(f"{what} failed: {_first_line(error)}; enqueued last: {self._latest}", error)

    def _fail(self, failure: str, error: Exception) -> NoReturn:
        self._failure = failure
        raise DeviceError(failure) from error


def _first_line(error: Exception) -> str:
    """What torch says before its advice."""
    return str(error).partition("\n")[0]
