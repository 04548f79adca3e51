"""Copies of records to a device: those that the forward pass waits for go before those that are speculative."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .base import Device, Event

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 2 << 20
"""A speculative copy under way delays a demand by the copy of no more."""


class Copy(NamedTuple):
    """Bytes to copy: ``[nbytes]`` uint8 each, contiguous."""

    target: "torch.Tensor"
    source: "torch.Tensor"
    after: Event | None = None
    """The last work of another stream that reads or writes the target: the copy starts after it."""


class SpeculativeCopy:
    """Copies of one record that nobody waits for, in pieces of ``PIECE_BYTES``."""

    __slots__ = ("cancelled", "event", "pieces")

    def __init__(self, copies: Sequence[Copy]):
        self.pieces = deque(_pieces(copies))
        """Not enqueued yet."""
        self.event: Event | None = None
        """Behind the last piece that has been enqueued."""
        self.cancelled = False


class TransferQueue:
    """Copies to one device on a stream of their own.

    *Order.* Copies are made in the order in which they are enqueued: of two into the same memory the later one stays,
    whatever became of the other. A demand is enqueued when it is made. A piece of a speculative copy is enqueued by
    ``pump``, when no other copy of this queue is under way and the target is free; the next speculative copy begins
    when all of one is enqueued.

    *Memory.* The caller keeps targets and sources as they are until the event of a demand is finished, or a
    speculative copy is ``settled``.

    *Failures.* A copy that the device refuses raises from the call that enqueues it. Nothing is tried twice.
    """

    def __init__(self, device: Device):
        self.demanded_bytes = 0
        """Enqueued because the forward pass waits for them."""
        self.speculative_bytes = 0
        """Enqueued by ``pump``."""
        self._device = device
        self._stream = device.stream("copies", urgent=True)
        self._speculation: deque[SpeculativeCopy] = deque()
        """With pieces not enqueued yet. Pieces of the first one may have been."""
        self._last: Event | None = None
        """Behind everything enqueued so far."""

    def demand(self, copies: Sequence[Copy]) -> Event:
        """Enqueue ``copies`` now; returns the event behind them, which kernels that read the targets wait for."""
        self.demanded_bytes += self._enqueue(copies)
        self._last = self._device.record(self._stream)
        return self._last

    def speculate(self, copies: Sequence[Copy]) -> SpeculativeCopy:
        """Have the copies of one record made behind the speculative ones before, when nothing else is to be copied.

        Raises:
            ValueError: the sizes of a target and its source differ.
        """
        speculative = SpeculativeCopy(copies)
        assert speculative.pieces, "a record has bytes"
        self._speculation.append(speculative)
        return speculative

    def pump(self) -> None:
        """Enqueue the next piece of a speculative copy if its turn has come. To be called at least once a layer."""
        if not self._speculation or not self._idle() or not self._free(self._speculation[0].pieces[0]):
            return
        speculative = self._speculation[0]
        self.speculative_bytes += self._enqueue(speculative.pieces.popleft())
        speculative.event = self._last = self._device.record(self._stream)
        if not speculative.pieces:
            self._speculation.popleft()

    def promote(self, speculative: SpeculativeCopy) -> Event:
        """The forward pass waits for ``speculative``, which has not been cancelled: enqueue what is left of it now.

        Returns the event behind all of it.
        """
        assert not speculative.cancelled, "a cancelled speculative copy is not promoted"
        if speculative.pieces:
            speculative.event = self.demand([copy for piece in self._take_back(speculative) for copy in piece])
        assert speculative.event is not None, "a speculative copy without pieces has been enqueued"
        return speculative.event

    def cancel(self, speculative: SpeculativeCopy) -> None:
        """Enqueue no more of ``speculative``; the target may be given to a later copy of this queue at once."""
        speculative.cancelled = True
        if speculative.pieces:
            self._take_back(speculative)

    def settled(self, speculative: SpeculativeCopy) -> bool:
        """Whether no piece of it is under way or will be: its record has arrived unless it was cancelled."""
        return not speculative.pieces and (speculative.event is None or self._device.finished(speculative.event))

    def _take_back(self, speculative: SpeculativeCopy) -> list[list[Copy]]:
        """The pieces of ``speculative`` that have not been enqueued and will not be by ``pump``."""
        self._speculation.remove(speculative)
        pieces = list(speculative.pieces)
        speculative.pieces.clear()
        return pieces

    def _idle(self) -> bool:
        return self._last is None or self._device.finished(self._last)

    def _free(self, piece: Sequence[Copy]) -> bool:
        return all(copy.after is None or self._device.finished(copy.after) for copy in piece)

    def _enqueue(self, copies: Sequence[Copy]) -> int:
        """Returns how many bytes."""
        awaited: set[int] = set()
        for copy in copies:
            if copy.after is not None and id(copy.after) not in awaited:
                self._device.wait(self._stream, copy.after)
                awaited.add(id(copy.after))
            self._device.copy(self._stream, copy.target, copy.source)
        return sum(copy.target.nbytes for copy in copies)


def _pieces(copies: Sequence[Copy]) -> list[list[Copy]]:
    """``copies`` in order, cut where ``PIECE_BYTES`` are full."""
    pieces: list[list[Copy]] = []
    room = 0
    for target, source, after in copies:
        if target.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes are copied to {target.nbytes}")
        start = 0
        while start < target.nbytes:
            if not room:
                pieces.append([])
                room = PIECE_BYTES
            end = min(start + room, target.nbytes)
            pieces[-1].append(Copy(target[start:end], source[start:end], after))
            room -= end - start
            start = end
    return pieces
