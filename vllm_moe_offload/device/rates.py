"""How fast a device reads host memory, and how much of that runs beside its kernels. Measured with the host's clock."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .base import Device, Stream

COPY_SIZES = (256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_ROUNDS = 7


class CopyRates(NamedTuple):
    """Bytes per second from registered host memory, by the size of a copy."""

    alone: dict[int, float]
    """One copy, waited for."""
    together: dict[int, float]
    """As many as the memory holds, enqueued one after the other; then waited for."""


class Overlap(NamedTuple):
    """Seconds of copies and a kernel, each for itself and both at once."""

    copies: float
    kernel: float
    both: float

    @property
    def hidden(self) -> float:
        """Which share of the shorter one's time the other hides: 1 where both at once take as long as the longer."""
        return (self.copies + self.kernel - self.both) / max(min(self.copies, self.kernel), 1e-12)


def median_seconds(work: Callable[[], None], rounds: int = _ROUNDS) -> float:
    """Of ``work``, which waits for what it enqueues; the first time does not count."""
    work()
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return max(statistics.median(taken), 1e-9)


def registration_seconds(device: Device, memory: NDArray[np.uint8]) -> float:
    """How long it takes to make ``memory`` readable for the device; it stays registered.

    Raises:
        RegistrationError: the driver refuses.
    """
    began = time.perf_counter()
    device.register(memory)
    return time.perf_counter() - began


def copy_rates(device: Device, memory: NDArray[np.uint8]) -> CopyRates:
    """Copies of ``COPY_SIZES`` out of registered ``memory``; sizes it does not hold are left out."""
    source, target = torch.from_numpy(memory), device.allocate(memory.nbytes)
    stream = device.stream("measured copies", urgent=True)
    rates = CopyRates({}, {})
    for size in COPY_SIZES:
        count = memory.nbytes // size
        if not count:
            continue
        one = median_seconds(lambda size=size: _copy(device, stream, target, source, size, 1))  # type: ignore[misc]
        many = median_seconds(lambda size=size, count=count: _copy(device, stream, target, source, size, count))  # type: ignore[misc]
        rates.alone[size], rates.together[size] = size / one, count * size / many
    return rates


def overlap(device: Device, memory: NDArray[np.uint8], width: int = 8192) -> Overlap:
    """Copies out of registered ``memory`` beside products of two matrices of ``width`` in bfloat16."""
    source, target = torch.from_numpy(memory), device.allocate(memory.nbytes)
    matrix = device.allocate(2 * width * width).view(torch.bfloat16).view(width, width)
    stream = device.stream("measured copies", urgent=True)

    def compute(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    def kernels(times: int) -> None:
        compute(times)
        device.synchronize(device.record(device.main))

    def both(times: int) -> None:
        device.copy(stream, target, source)
        copied = device.record(stream)
        kernels(times)
        device.synchronize(copied)

    copies = median_seconds(lambda: _copy(device, stream, target, source, memory.nbytes, 1))
    times = max(1, round(copies / median_seconds(lambda: kernels(1))))
    return Overlap(copies, median_seconds(lambda: kernels(times)), median_seconds(lambda: both(times)))


def _copy(device: Device, stream: Stream, target: torch.Tensor, source: torch.Tensor, size: int, count: int) -> None:
    for number in range(count):
        piece = slice(number * size, (number + 1) * size)
        device.copy(stream, target[piece], source[piece])
    device.synchronize(device.record(stream))
