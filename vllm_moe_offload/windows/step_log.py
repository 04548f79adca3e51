"""What a device has decided comes to the host a step or two later; the host does not wait for it."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device, DeviceError, Event
from .device_tables import Kernels, Ring

AHEAD = 2
"""Steps that the host may be ahead of the device without waiting: vLLM waits for the tokens of the step before last."""
STEPS = 2 * AHEAD + 1
"""Kept on the device. Its kernels wait until the step ``AHEAD`` before theirs has been copied."""


class RoutedStep(NamedTuple):
    """One step as the device has served it."""

    number: int
    ids: NDArray[np.int16]
    """``[layers, rows, top_k]`` of real rows: what they were routed to, -1 where there is none."""
    used: NDArray[np.int64]
    """``[layers]``: distinct experts, 0 where all of a layer were brought in."""
    misses: NDArray[np.int64]
    """``[layers]``: records copied because the step used them."""
    started: NDArray[np.int64]
    """``[layers]``: speculative loads since the step before that ran the layer."""
    useful: NDArray[np.int64]
    """``[layers]``: experts used for the first time since they were loaded speculatively."""
    wasted: NDArray[np.int64]
    """``[layers]``: experts overwritten since they were loaded speculatively, and not used between."""


class _Read(NamedTuple):
    step: int
    rows: int
    event: Event


class StepLog:
    """Copies the ring's entries to the host on a stream of their own.

    Args:
        record_bytes: of one record of each layer.
        most_rows: of any step, padding included.
    """

    def __init__(self, device: Device, kernels: Kernels, record_bytes: Sequence[int], top_k: int, most_rows: int):
        self._device, self._kernels, self._top_k = device, kernels, top_k
        self._record_bytes = np.array(record_bytes)
        self._layers = len(record_bytes)
        self.ring = Ring(device, STEPS, self._layers, self._layers * most_rows * top_k)
        self._stream = device.stream("step log")
        self._ids, self._notes = (
            [device.allocate_pinned(entry.nbytes).view(entry.dtype) for entry in kept]
            for kept in (self.ring.ids, self.ring.notes)
        )
        self._step = 1
        self._reads: deque[_Read] = deque()
        self._complete: list[RoutedStep] = []

    @property
    def step(self) -> int:
        """The number of the step that is next or under way, in the ring and in ``RoutedStep``."""
        return self._step

    def end_step(self, rows: int) -> None:
        """The kernels of a step of so many ``rows`` at most, padding included, have been enqueued."""
        entry = self._step % STEPS
        if self._reads and self._reads[0].step == self._step - STEPS:
            self._device.synchronize(self._reads[0].event)
            self._take(self._reads.popleft())
        self._device.wait(self._stream, self._device.record(self._device.main))
        ids = self.ring.ids[entry, : self._layers * rows * self._top_k]
        for target, source in ((self._ids[entry], ids), (self._notes[entry], self.ring.notes[entry].reshape(-1))):
            if len(source):  # memory of no bytes has no address
                self._device.copy(self._stream, target[: len(source)].view(torch.uint8), source.view(torch.uint8))
        self._reads.append(_Read(self._step, rows, self._device.record(self._stream)))
        self._step += 1
        for read in self._reads:
            if read.step == self._step - AHEAD:
                self._device.wait(self._device.main, read.event)
        self._kernels.advance(self.ring)

    def finished(self) -> list[RoutedStep]:
        """Steps that have come to the host and were not returned before, oldest first.

        Raises:
            DeviceError: a step has used more experts than a window has slots, or copied other than it planned.
        """
        while self._reads and self._device.finished(self._reads[0].event):
            self._take(self._reads.popleft())
        complete, self._complete = self._complete, []
        return complete

    def _take(self, read: _Read) -> None:
        entry = read.step % STEPS
        notes = self._notes[entry].view(self._layers, -1).numpy()
        steps, n_ids, n_real, used, misses, overflow, copied, *outcomes = notes.T.copy()
        if (steps != read.step).any():
            return  # not all layers ran: nothing of it is to be learned from
        if overflow.any():
            layer = int(np.flatnonzero(overflow)[0])
            raise DeviceError(f"step {read.step} used more experts of layer {layer} than its window has slots")
        if (copied != misses * self._record_bytes).any():
            layer = int(np.flatnonzero(copied != misses * self._record_bytes)[0])
            planned = misses[layer] * self._record_bytes[layer]
            raise DeviceError(f"step {read.step} copied {copied[layer]} bytes to layer {layer}, planned {planned}")
        rows = int(n_ids[0]) // self._top_k
        shape = self._layers, rows, self._top_k
        assert rows <= read.rows and (n_ids == rows * self._top_k).all(), (n_ids, shape)
        ids = self._ids[entry][: int(np.prod(shape))].view(shape).numpy()
        real = int(n_real[0]) // self._top_k
        self._complete.append(RoutedStep(read.step, ids[:, :real].copy(), used, misses, *outcomes))
