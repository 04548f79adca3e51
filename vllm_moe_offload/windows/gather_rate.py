"""How fast the device loads records by itself: the kernel that device-managed windows use, measured."""

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device, DeviceError
from ..device.rates import median_seconds
from . import kernels
from .device_tables import DeviceTables, Ring, Window, zeros
from .launches import TritonKernels

PROGRAMS = (4, 16, 64, 128)
_LANE_BYTES = 16


def gather_rates(
    device: Device, memory: NDArray[np.uint8], record_bytes: int, programs: tuple[int, ...] = PROGRAMS
) -> dict[int, float]:
    """Bytes per second by the number of programs, of loading all records of registered ``memory``, the last one first.

    Raises:
        DeviceError: something else than the records arrived.
    """
    assert record_bytes % _LANE_BYTES == 0
    count = memory.nbytes // record_bytes
    target, ring = device.allocate(count * record_bytes), Ring(device, 1, 1, 1)
    listed = [count, *(number for record in range(count) for number in (record, count - 1 - record, -1))]
    misses = zeros(device, (len(listed),), torch.int32)
    misses.copy_(torch.tensor(listed, dtype=torch.int32))
    components = zeros(device, (1, kernels.COMPONENT), torch.int64)
    about = [target.data_ptr(), device.address(memory), 0, record_bytes, _LANE_BYTES]
    components.copy_(torch.tensor([about]))

    (layer,) = DeviceTables(device, [Window(count, count, 0, False)]).layers

    def gather(grid: int) -> None:
        TritonKernels(count, programs=grid).gather(layer, components, misses, ring)
        device.synchronize(device.record(device.main))

    rates = {}
    for grid in programs:
        target.zero_()
        rates[grid] = count * record_bytes / median_seconds(lambda grid=grid: gather(grid))  # type: ignore[misc]
        _compare(target, memory, record_bytes)
    return rates


def _compare(target: torch.Tensor, memory: NDArray[np.uint8], record_bytes: int) -> None:
    arrived = target.cpu().numpy().reshape(-1, record_bytes)
    if not np.array_equal(arrived[::-1], memory[: target.nbytes].reshape(-1, record_bytes)):
        raise DeviceError("the device read something else than the host memory it was given")
