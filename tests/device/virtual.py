"""A device over memory of this process whose work runs late, in halves, in any order that its streams and events allow.

A protocol that lacks a wait gives wrong bytes, or raises ``CorruptionError``, in some of the orders: run it with many
seeds. Changing the preferred stream rarely finds more of them than drawing one for each half of an operation.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_moe_offload.device import Device, DeviceError, OutOfDeviceMemoryError, RegistrationError
from vllm_moe_offload.device.ranges import AddressRanges

Memory: TypeAlias = torch.Tensor | NDArray[np.generic]
Bytes: TypeAlias = NDArray[np.uint8]

POISON = 0xEE
"""What memory holds while it is written."""

_ALIGNMENT = 256
_CHANGE_OF_PREFERENCE = 0.08
_STEPS = (1, 2, 5, 15)
_CHANCES_TO_RUN = (0.01, 0.05, 0.1, 0.2)


class CorruptionError(AssertionError):
    """Memory was written while an operation read or wrote it."""


class VirtualEvent:
    """Behind one operation; behind nothing if its stream was empty."""

    __slots__ = ("operation", "recorded")

    def __init__(self, operation: "_Operation | None"):
        self.operation = operation
        self.recorded = time.perf_counter()

    @property
    def complete(self) -> bool:
        return self.operation is None or self.operation.done


class VirtualStream:
    """Operations not done yet, and the events that the next one enqueued waits for."""

    def __init__(self, name: str):
        self.name = name
        self.queue: deque[_Operation] = deque()
        self.waits: list[VirtualEvent] = []
        self.last: _Operation | None = None
        self.preference = 0.5


@dataclass
class Faults:
    """How many more calls of each kind succeed before one does not; None: all of them."""

    copies: int | None = None
    """Enqueued; the next one is refused with a ``ValueError``."""

    allocations: int | None = None
    registrations: int | None = None
    """And allocations of pinned memory."""

    operations: int | None = None
    """Run by the device; the next one fails, and with it the device for good."""

    def due(self, kind: str) -> bool:
        """Count a call; whether it is the one that does not succeed."""
        left = getattr(self, kind)
        if left is not None:
            setattr(self, kind, left - 1 if left else None)
        return left == 0


class _Operation:
    """Reads ``reads()`` while it runs, and has written ``writes()`` when it ends."""

    def __init__(
        self,
        name: str,
        stream: VirtualStream,
        reads: Callable[[], Sequence[Memory]],
        compute: Callable[[list[Memory]], None],
        writes: Callable[[], Sequence[Memory]],
    ):
        self.name, self.stream, self.waits = name, stream, stream.waits
        self.begun = self.done = False
        self._reads, self._compute, self._writes = reads, compute, writes

    def begin(self) -> None:
        self._read = list(self._reads())
        self._values = [memory.clone() if isinstance(memory, torch.Tensor) else memory.copy() for memory in self._read]
        self._written = [as_bytes(memory) for memory in self._writes()]
        for memory in self._written:
            memory[:] = POISON
        self._seen = [as_bytes(memory).copy() for memory in self._read]
        self.begun = True

    def end(self) -> None:
        for memory, seen in zip(self._read, self._seen, strict=True):
            if not np.array_equal(as_bytes(memory), seen):
                raise CorruptionError(f"{self.name} on {self.stream.name} read memory while it was written")
        if any((memory != POISON).any() for memory in self._written):
            raise CorruptionError(f"{self.name} on {self.stream.name} wrote memory while something else wrote it")
        self._compute(self._values)
        self.done = True


class VirtualDevice(Device):
    """What is enqueued runs in later calls, of which each may run a few halves of operations, drawn at random.

    Args:
        order: decides what runs when; a seed, or a source of numbers.
        capacity: bytes that can be allocated in all; None: any number.
        main_is_host: work on ``main`` is done when it is enqueued, as that of kernels of this processor; ``wait`` of
            ``main`` runs what the event needs and nothing else.
        frozen: number (from 0, as enqueued) of an operation that runs only when nothing else can, or is waited for.
        scattered: the device sees each registered range at an address of its own.
        chance_to_run: how likely a call that does not wait is to run anything; None: drawn, between 0.01 and 0.2.
    """

    main: VirtualStream

    def __init__(
        self,
        order: random.Random | int = 0,
        *,
        capacity: int | None = None,
        main_is_host: bool = False,
        frozen: int | None = None,
        scattered: bool = False,
        chance_to_run: float | None = None,
    ):
        self.faults = Faults()
        self.streams: list[VirtualStream] = []
        self.main = self._new_stream("main")
        self.enqueued = 0
        self.registered: dict[int, Bytes] = {}
        """By address."""
        self._allocated_bytes = 0
        self._kept: list[torch.Tensor] = []
        self._ranges = AddressRanges()
        self._order = random.Random(order) if isinstance(order, int) else order
        self._capacity, self._main_is_host, self._frozen, self._scattered = capacity, main_is_host, frozen, scattered
        self._chance_to_run = self._order.choice(_CHANCES_TO_RUN) if chance_to_run is None else chance_to_run
        self._frozen_operation: _Operation | None = None
        self._failure: str | None = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._check()
        free = nbytes if self._capacity is None else self._capacity - self._allocated_bytes
        if nbytes > free or self.faults.due("allocations"):
            raise OutOfDeviceMemoryError(nbytes, min(free, max(nbytes - 1, 0)))
        self._allocated_bytes += nbytes
        return self._new_memory(nbytes)

    def allocate_pinned(self, nbytes: int) -> torch.Tensor:
        self._check()
        if self.faults.due("registrations"):
            raise RegistrationError("the virtual driver was told to refuse")
        return self._new_memory(nbytes)

    def register(self, memory: Bytes) -> None:
        self._check()
        assert memory.flags.c_contiguous and memory.nbytes, "contiguous memory is registered"
        if self.faults.due("registrations"):
            raise RegistrationError("the virtual driver was told to refuse")
        if any(np.may_share_memory(part, memory) for part in self.registered.values()):
            raise RegistrationError("part of the memory is registered already")
        start = memory.ctypes.data
        self.registered[start] = memory.reshape(-1)
        self._ranges.add(start, memory.nbytes, start + (len(self.registered) << 44 if self._scattered else 0))

    def unregister(self, memory: Bytes) -> None:
        self._check()
        part = self.registered.pop(memory.ctypes.data)
        assert part.nbytes == memory.nbytes, "what was registered is unregistered"
        self._ranges.remove(memory.ctypes.data, memory.nbytes)

    def address(self, memory: Bytes) -> int:
        address = self._ranges.address(memory.ctypes.data, memory.nbytes)
        assert address is not None, "the memory is not registered, or not in one piece"
        return address

    def stream(self, name: str, urgent: bool = False) -> VirtualStream:
        self._check()
        return self._new_stream(name)

    def copy(self, stream: VirtualStream, target: torch.Tensor, source: torch.Tensor) -> None:
        self._go_on()
        for side in (target, source):
            if side.dtype != torch.uint8 or side.ndim != 1 or not side.is_contiguous():
                raise ValueError(f"a copy is of contiguous bytes, not {side.dtype} {tuple(side.shape)}")
            if not self._reaches(side):
                raise ValueError(f"{side.nbytes} bytes on the host are not registered")
        if target.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes are copied to {target.nbytes}")
        if self.faults.due("copies"):
            raise ValueError("the virtual driver was told to refuse")

        def reads() -> list[torch.Tensor]:
            if not self._reaches(source) or not self._reaches(target):
                raise CorruptionError("memory was unregistered before its copy was made")
            return [source]

        def write(values: list[Memory]) -> None:
            reads()
            target.copy_(values[0])

        self._enqueue("copy", stream, reads, write, lambda: [target])

    def kernel(
        self,
        stream: VirtualStream,
        reads: Callable[[], Sequence[Memory]],
        compute: Callable[[list[Memory]], None],
        writes: Callable[[], Sequence[Memory]] = lambda: (),
        name: str = "kernel",
    ) -> None:
        """Enqueue a kernel.

        Args:
            reads: asked when the kernel begins for what it reads; what changes before it ends is an error.
            compute: called when the kernel ends with copies of what it read when it began; writes the results.
            writes: asked when the kernel begins for what it writes, which is ``POISON`` until it ends.
        """
        self._go_on()
        self._enqueue(name, stream, reads, compute, writes)

    def record(self, stream: VirtualStream) -> VirtualEvent:
        self._go_on()
        return VirtualEvent(stream.last)

    def timestamp(self, stream: VirtualStream) -> VirtualEvent:
        return VirtualDevice.record(self, stream)

    def seconds(self, begin: VirtualEvent, end: VirtualEvent) -> float:
        assert begin.complete and end.complete
        return end.recorded - begin.recorded

    def wait(self, stream: VirtualStream, event: VirtualEvent) -> None:
        self._check()
        if stream is self.main and self._main_is_host:
            self._run_until(event)
        else:
            stream.waits.append(event)
            self._go_on()

    def finished(self, event: VirtualEvent) -> bool:
        self._go_on()
        return event.complete

    def synchronize(self, event: VirtualEvent) -> None:
        self._check()
        if self._order.random() < 0.5:
            self._run_until(event)
        while not event.complete:
            assert self._step(forced=True), "an event is behind work that waits for itself"

    def drain(self) -> None:
        """Run everything that has been enqueued."""
        self._check()
        while self._step(forced=True):
            pass
        assert not self.pending, "work waits for itself"

    def run_next(self, stream: VirtualStream) -> bool:
        """Run the next operation of ``stream`` to its end; whether there is one that waits for nothing."""
        if not stream.queue or not all(event.complete for event in stream.queue[0].waits):
            return False
        operation = stream.queue[0]
        while not operation.done:
            self._advance(stream)
        return True

    @property
    def pending(self) -> int:
        """Operations enqueued and not done."""
        return sum(len(stream.queue) for stream in self.streams)

    def _new_stream(self, name: str) -> VirtualStream:
        self.streams.append(VirtualStream(name))
        return self.streams[-1]

    def _reaches(self, memory: torch.Tensor) -> bool:
        return self._ranges.address(memory.data_ptr(), memory.nbytes) is not None

    def _new_memory(self, nbytes: int) -> torch.Tensor:
        whole = torch.zeros(nbytes + _ALIGNMENT, dtype=torch.uint8)
        memory = whole[-whole.data_ptr() % _ALIGNMENT :][:nbytes]
        self._ranges.add(memory.data_ptr(), nbytes, memory.data_ptr())
        self._kept.append(memory)
        return memory

    def _enqueue(
        self,
        name: str,
        stream: VirtualStream,
        reads: Callable[[], Sequence[Memory]],
        compute: Callable[[list[Memory]], None],
        writes: Callable[[], Sequence[Memory]],
    ) -> None:
        operation = _Operation(name, stream, reads, compute, writes)
        stream.waits = []
        if self.enqueued == self._frozen:
            self._frozen_operation = operation
        self.enqueued += 1
        stream.queue.append(operation)
        stream.last = operation
        if stream is self.main and self._main_is_host:
            self._run_until(VirtualEvent(operation))

    def _check(self) -> None:
        if self._failure is not None:
            raise DeviceError(self._failure)

    def _go_on(self) -> None:
        self._check()
        if self._order.random() < self._chance_to_run:
            for _ in range(self._order.choice(_STEPS)):
                if not self._step(forced=False):
                    return

    def _step(self, forced: bool) -> bool:
        """Half an operation of a stream whose first one may run; whether there was one."""
        ready = [stream for stream in self.streams if stream.queue and all(e.complete for e in stream.queue[0].waits)]
        going = [stream for stream in ready if stream.queue[0] is not self._frozen_operation] or (
            ready if forced else []
        )
        if not going:
            return False
        if self._order.random() < _CHANGE_OF_PREFERENCE:
            for stream in self.streams:
                stream.preference = self._order.random()
        self._advance(max(going, key=lambda stream: stream.preference))
        return True

    def _run_until(self, event: VirtualEvent) -> None:
        """What ``event`` needs and nothing else."""
        while event.operation is not None and not event.complete:
            stream = event.operation.stream
            while unmet := next((e.operation for e in stream.queue[0].waits if e.operation and not e.complete), None):
                stream = unmet.stream
            self._advance(stream)

    def _advance(self, stream: VirtualStream) -> None:
        operation = stream.queue[0]
        if not operation.begun:
            if self.faults.due("operations"):
                self._failure = f"{operation.name} on {stream.name} failed"
            self._check()
            operation.begin()
        else:
            operation.end()
            stream.queue.popleft()


def as_bytes(memory: Memory) -> Bytes:
    """The bytes of contiguous memory, not a copy of them."""
    if isinstance(memory, torch.Tensor):
        assert memory.is_contiguous(), "kernels read and write contiguous parts"
        return memory.reshape(-1).view(torch.uint8).numpy()
    assert memory.flags.c_contiguous, "kernels read and write contiguous parts"
    return memory.reshape(-1).view(np.uint8)
