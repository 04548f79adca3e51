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
_ON_DEVICE = AHEAD
"""Steps kept there: the kernels of a step wait until the one ``AHEAD`` before it has been copied."""
_ON_HOST = AHEAD + 2


class RoutedStep(NamedTuple):
    """One step as the device has served it."""

    number: int
    ids: NDArray[np.int16]
    """``[layers, rows, top_k]`` of real rows: what they were routed to, -1 where there is none."""
    weights: NDArray[np.float16]
    """Likewise: the router's weights."""
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
    warmed: NDArray[np.int64]
    """``[layers]``: records that ``warm`` has brought into windows."""
    seconds: float
    """From ``begin_step`` to its end, by the device's clock."""


class _Read(NamedTuple):
    step: int
    rows: int
    event: Event
    began: Event
    ended: Event


class StepLog:
    """Copies the ring's entries to the host on a stream of their own.

    The first half of an entry's notes is of the layers of its step, the second of what they were warmed with.

    Args:
        record_bytes: of one record of each layer.
        most_rows: of any step.
    """

    def __init__(self, device: Device, kernels: Kernels, record_bytes: Sequence[int], top_k: int, most_rows: int):
        self._device, self._kernels, self._top_k = device, kernels, top_k
        self._record_bytes = np.array(record_bytes)
        self._layers = len(record_bytes)
        self.ring = Ring(device, _ON_DEVICE, 2 * self._layers, self._layers * most_rows * top_k)
        self._stream = device.stream("step log")
        self._choices, self._notes = (
            device.allocate_pinned(_ON_HOST * kept[0].nbytes).view(kept.dtype).view(_ON_HOST, -1)
            for kept in (self.ring.choices, self.ring.notes)
        )
        self.step = 1
        """The number of the step that is next or under way, in the ring and in ``RoutedStep``."""
        self._began: Event | None = None
        self._reads: deque[_Read] = deque()
        self._complete: list[RoutedStep] = []

    def begin_step(self) -> None:
        """The kernels of a step are enqueued next."""
        self._began = self._device.timestamp(self._device.main)

    def end_step(self, rows: int) -> None:
        """The kernels of a step of so many ``rows`` at most, padding left out, have been enqueued."""
        self._take_finished()
        if self._reads and self._reads[0].step == self.step - _ON_HOST:
            self._device.synchronize(self._reads[0].event)
            self._take(self._reads.popleft())
        ended = self._device.timestamp(self._device.main)
        began, self._began = self._began or ended, None
        self._device.wait(self._stream, ended)
        here, there = self.step % _ON_HOST, self.step % _ON_DEVICE
        choices = self.ring.choices[there, : self._layers * rows * self._top_k]
        notes = self.ring.notes[there].reshape(-1)
        for target, source in ((self._choices[here], choices), (self._notes[here], notes)):
            if len(source):  # memory of no bytes has no address
                self._device.copy(self._stream, target[: len(source)].view(torch.uint8), source.view(torch.uint8))
        self._reads.append(_Read(self.step, rows, self._device.record(self._stream), began, ended))
        self.step += 1
        for read in self._reads:
            if read.step == self.step - AHEAD:
                self._device.wait(self._device.main, read.event)
        self._kernels.advance(self.ring)

    def finished(self, wait: bool = False) -> list[RoutedStep]:
        """Steps that have come to the host and were not returned before, oldest first.

        Args:
            wait: for all that have ended.

        Raises:
            DeviceError: a step has used more experts than a window has slots, or copied other than it planned.
        """
        if wait and self._reads:
            self._device.synchronize(self._reads[-1].event)
        self._take_finished()
        complete, self._complete = self._complete, []
        return complete

    def _take_finished(self) -> None:
        while self._reads and self._device.finished(self._reads[0].event):
            self._take(self._reads.popleft())

    def _take(self, read: _Read) -> None:
        place = read.step % _ON_HOST
        notes = self._notes[place].view(2, self._layers, -1).numpy()
        _, _, _, warmed, _, warm_bytes, *before = np.where(notes[1, :, :1] == read.step, notes[1], 0).T
        steps, n_real, used, misses, overflow, copied, *outcomes = notes[0].T.copy()
        self._check_bytes(read.step, warmed, warm_bytes)
        if (steps != read.step).any():
            return  # not all layers ran: nothing of it is to be learned from
        if overflow.any():
            layer = int(np.flatnonzero(overflow)[0])
            raise DeviceError(f"step {read.step} used more experts of layer {layer} than its window has slots")
        self._check_bytes(read.step, misses, copied)
        rows = int(n_real[0]) // self._top_k
        assert rows <= read.rows and (n_real == rows * self._top_k).all(), (n_real, read)
        choices = self._choices[place][: self._layers * rows * self._top_k].numpy().copy()
        ids, weights = choices.view(np.int16).reshape(self._layers, rows, self._top_k, 2).transpose(3, 0, 1, 2)
        started, useful, wasted = (own + warm for own, warm in zip(outcomes, before, strict=True))
        seconds, shares = self._device.seconds(read.began, read.ended), weights.view(np.float16)
        self._complete.append(
            RoutedStep(read.step, ids, shares, used, misses, started, useful, wasted, warmed, seconds)
        )

    def _check_bytes(self, step: int, records: NDArray[np.int64], copied: NDArray[np.int64]) -> None:
        planned = records * self._record_bytes
        if (copied != planned).any():
            layer = int(np.flatnonzero(copied != planned)[0])
            raise DeviceError(f"step {step} copied {copied[layer]} bytes to layer {layer}, planned {planned[layer]}")
