"""Host memory of records that copies and kernels of a device read where it lies."""

import math
import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .base import Device, RegistrationError

CHUNK_BYTES = 64 << 30
"""Drivers refuse to register several hundred GiB in one call."""


class RegisteredMemory:
    """Registers the components of a pool's slots, all or none.

    A chunk registered in one call has whole slots only, since a copy may not cross from one to the next.

    Args:
        arrays: per component uint8 ``[slots, nbytes]``, contiguous. They stay where they are until ``close``.
        chunk_bytes: the most that is registered in one call, unless one slot is more.

    Raises:
        RegistrationError: the driver refuses; nothing is registered then.
    """

    def __init__(self, device: Device, arrays: Sequence[NDArray[np.uint8]], chunk_bytes: int = CHUNK_BYTES):
        self._device = device
        self._components = tuple(arrays)
        self._registered: list[NDArray[np.uint8]] = []
        try:
            for component in arrays:
                for chunk in _chunks(component, chunk_bytes):
                    device.register(chunk)
                    self._registered.append(chunk)
        except BaseException:
            self.close()
            raise
        self._chunk_bytes = chunk_bytes

    def address(self, component: int) -> int:
        """Where kernels of the device read the first byte of ``component``; the others follow it. 0 if it has none.

        Raises:
            RegistrationError: the device sees the chunks of the component apart.
        """
        memory = self._components[component]
        if not memory.nbytes:
            return 0
        first = self._device.address(memory[0])
        for chunk in _chunks(memory, self._chunk_bytes):
            offset = chunk.ctypes.data - memory.ctypes.data
            if self._device.address(chunk) != first + offset:
                raise RegistrationError("the device sees memory registered in several calls at addresses apart")
        return first

    def parts(self, component: int, slots: range) -> list[NDArray[np.uint8]]:
        """``slots`` of ``component`` in order, ``[count, nbytes]`` each, cut where a copy may not go on."""
        memory, found, start = self._components[component], [], 0
        for chunk in _chunks(memory, self._chunk_bytes):
            part = chunk[max(0, slots.start - start) : max(0, slots.stop - start)]
            if len(part):
                found.append(part)
            start += len(chunk)
        return found

    def close(self) -> None:
        """Unregister everything, the last first. No work that reads it may be enqueued or under way."""
        while self._registered:
            self._device.unregister(self._registered[-1])
            self._registered.pop()


def _chunks(memory: NDArray[np.uint8], chunk_bytes: int) -> list[NDArray[np.uint8]]:
    """``memory`` cut between slots, and between pages where that leaves chunks of no more than ``chunk_bytes``.

    Nothing, if its slots have no bytes: kernels are shown tensors without elements for what a checkpoint lacks.
    """
    slots, nbytes = memory.shape
    if not nbytes:
        return []
    at_once = max(1, chunk_bytes // nbytes)
    whole_pages = mmap.PAGESIZE // math.gcd(nbytes, mmap.PAGESIZE)
    if at_once >= whole_pages:
        at_once -= at_once % whole_pages
    return [memory[first : first + at_once] for first in range(0, slots, at_once)]
