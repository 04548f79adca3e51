"""Host memory behind windows: records on their way from host pools to the device.

It must never let go of a host slot that a copy may still read, nor pass a record on that could not be read.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.base import IntArray
from ..device.base import Device, Event, RegistrationError
from ..device.registered import RegisteredMemory
from ..device.transfer import Copy, SpeculativeCopy, TransferQueue
from ..load_report import NOTHING, LoadReport
from ..pool.base import Failure, Hold, HostPool, Span
from ..pool.operations import Operations

Parts = tuple[torch.Tensor, ...]
"""A record: per component uint8 ``[nbytes]``."""

LINK_BYTES_PER_SECOND = 2e10
"""Assumed of copies, whose time the host does not see."""

_BOUNCE_RECORDS = 8


class Carried(NamedTuple):
    """What became of records that were asked for on the device."""

    event: Event | None
    """Behind the copies; None where there are none."""
    failures: list[Failure]
    report: LoadReport


class _Read(NamedTuple):
    source: HostPool
    hold: Hold
    copies: Event | SpeculativeCopy


class HostReads:
    """The copies of one engine, and the host slots that they read: held until these copies are made.

    Args:
        device: with the windows.
    """

    def __init__(self, device: Device):
        self.device = device
        self.queue = TransferQueue(device)
        self._reads: list[_Read] = []

    def demand(self, source: HostPool, hold: Hold, copies: Sequence[Copy]) -> Event:
        """Enqueue copies out of the slots of ``hold``."""
        event = self.queue.demand(copies)
        self._reads.append(_Read(source, hold, event))
        return event

    def speculate(self, source: HostPool, hold: Hold, copies: Sequence[Copy]) -> SpeculativeCopy:
        """Copy out of the slots of ``hold`` when nothing is demanded."""
        speculative = self.queue.speculate(copies)
        self._reads.append(_Read(source, hold, speculative))
        return speculative

    def held(self, source: HostPool) -> int:
        """Slots of ``source`` that are read, at most."""
        return sum(len(read.hold.experts) for read in self._reads if read.source is source)

    def reap(self) -> None:
        """Let go of what has been copied."""
        for read in list(self._reads):
            if (
                self.queue.settled(read.copies)
                if isinstance(read.copies, SpeculativeCopy)
                else self.device.finished(read.copies)
            ):
                self._let_go(read)

    def make_room(self, source: HostPool, count: int) -> float:
        """Wait for copies until ``count`` more slots of ``source`` can be held. Returns the seconds waited."""
        started = time.perf_counter()
        most = source.capacity - count if source.holds_overlap else 0
        while self.held(source) > most:
            self._complete(next(read for read in self._reads if read.source is source))
        return time.perf_counter() - started

    def finish(self) -> None:
        """Wait for all copies."""
        while self._reads:
            self._complete(self._reads[0])

    def close(self) -> None:
        """No slot is read or written any more, whatever has been enqueued. Speculative loads that wait are not made."""
        self.device.synchronize(self.queue.demand(()))
        while self._reads:
            self._let_go(self._reads[0])

    def _complete(self, read: _Read) -> None:
        if isinstance(read.copies, SpeculativeCopy):
            event = self.queue.promote(read.copies) if read.copies.pieces else read.copies.event
        else:
            event = read.copies
        if event is not None:
            self.device.synchronize(event)
        self._let_go(read)

    def _let_go(self, read: _Read) -> None:
        self._reads.remove(read)
        read.source.release(read.hold)


class HostTier:
    """One host pool, and the way from its slots to the device.

    Where its memory cannot be registered, records go through a buffer that the device can read.

    Args:
        operations: of all windows of the engine.
    """

    def __init__(self, device: Device, source: HostPool, operations: Operations[HostReads]):
        self.source = source
        self._device, self._operations = device, operations
        self._memory = source.memory
        self._components = source.memory.tensors()
        self.refused = ""
        """Why the memory could not be registered."""
        self._bounce: tuple[torch.Tensor, ...] = ()
        """Per component ``[_BOUNCE_RECORDS, nbytes]``."""
        self._predicts = False
        self._bounced: Event | None = None
        """Behind the copies that read it last."""
        self.register()

    def register(self) -> None:
        """Let the device read the pool's memory: at first, and after ``unregister``.

        A driver looks pages up once: where others may come to lie at the addresses, the device would go on reading
        the first ones.
        """
        self._registered: RegisteredMemory | None = None
        self.refused = ""
        if not self.source.pages_stay:
            self.refused = (
                "pages of it may be exchanged, as a daemon does where it has not promised to keep all experts"
            )
        else:
            try:
                self._registered = RegisteredMemory(self._device, [tensor.numpy() for tensor in self._components])
            except RegistrationError as error:
                self.refused = f"the driver refuses: {error}"
        if self.refused and not self._bounce:
            self._bounce = tuple(
                self._device.allocate_pinned(_BOUNCE_RECORDS * tensor.shape[1]).view(_BOUNCE_RECORDS, tensor.shape[1])
                for tensor in self._components
            )

    def unregister(self) -> None:
        """What lies behind the pool's memory is going to be exchanged. Nothing is copied."""
        if self._registered is not None:
            self._registered.close()
            self._registered = None

    def exchange(self, source: HostPool) -> None:
        """Another pool of the same memory takes this one's place. Nothing is copied."""
        assert source.memory is self._memory, "copies are made from the memory that was registered"
        self.source = source
        if self._registered is None:
            self.register()
        assert self._registered is None or source.pages_stay
        if self._predicts:
            source.enable_predictions()

    def enable_predictions(self) -> None:
        """``expect`` will be called of the source, and of those that take its place."""
        self._predicts = True
        self.source.enable_predictions()

    def bring(
        self, layer: Span, experts: IntArray, targets: Sequence[Parts], after: Event | None, streaming: bool = False
    ) -> Carried:
        """Wait until ``experts`` (distinct flat ids of ``layer``) are in host memory, and enqueue their copies.

        Args:
            targets: where each goes.
            after: what the copies wait for.
            streaming: for a long prefill.
        """
        reads = self._operations.loader
        done = Carried(None, [], NOTHING)
        part = self._records_at_a_time(streaming)
        for start in range(0, len(experts), part):
            chunk = experts[start : start + part]
            waited = reads.make_room(self.source, len(chunk))
            ask = self.source.hold_streaming if streaming else self.source.hold
            hold, report = ask(layer, chunk)
            event, failures = self._copy(hold, targets[start : start + part], after)
            report = self._of_misses(report, len(chunk) - len(failures), streaming) + LoadReport(waited=waited)
            done = Carried(done.event if event is None else event, done.failures + failures, done.report + report)
        return done

    def resident(self, layer: Span, experts: IntArray) -> tuple[Hold | None, LoadReport]:
        """A hold of those of ``experts`` in host memory that can be copied without waiting, if there are any."""
        reads = self._operations.loader
        reads.reap()
        room = self.source.capacity - reads.held(self.source)
        if self._registered is None or (not self.source.holds_overlap and room < self.source.capacity):
            return None, NOTHING
        hold, report = self.source.hold_resident(layer, experts[:room])
        if len(hold.experts):
            return hold, report
        self.source.release(hold)
        return None, report

    def forward(self, hold: Hold, targets: Sequence[Parts], after: Event | None) -> Event:
        """Enqueue copies of what ``hold``, of ``resident``, holds."""
        return self._operations.loader.demand(self.source, hold, copies(targets, self._in_place(hold.slots), after))

    def failures(self, hold: Hold) -> list[Failure]:
        """What of a hold of ``resident`` was taken away before it was copied; waits for that where it can happen."""
        if not self.source.holds_overlap:
            self._operations.loader.make_room(self.source, self.source.capacity)
        return hold.failures

    def speculate(self, hold: Hold, target: Parts, after: Event) -> SpeculativeCopy:
        """Copy the one record that ``hold`` holds, of ``resident``, when nothing is demanded, and after ``after``."""
        record = copies([target], self._in_place(hold.slots), after)
        return self._operations.loader.speculate(self.source, hold, record)

    def copied(self, records: int, *, prefetched: bool = False, streamed: bool = False) -> LoadReport:
        """So many records have been copied, on a prediction, through a stage, or because kernels wait for them."""
        nbytes = records * self._memory.layout.payload_bytes
        return LoadReport(
            copied=records,
            copied_bytes=nbytes,
            copied_prefetched_bytes=nbytes * prefetched,
            copied_streamed_bytes=nbytes * streamed,
        )

    def _of_misses(self, report: LoadReport, copied: int, streamed: bool) -> LoadReport:
        """What a host pool reports of experts that a window lacks, of which so many are copied: all are demanded."""
        demands = LoadReport(
            host_hits=report.hits,
            demanded=report.hits,
            demand_seconds=copied * self._memory.layout.payload_bytes / LINK_BYTES_PER_SECOND,
        )
        return report._replace(hits=0, misses=0) + demands + self.copied(copied, streamed=streamed)

    def _records_at_a_time(self, streaming: bool) -> int:
        most = max(1, self.source.capacity // 2) if streaming else self.source.capacity
        return most if self._registered is not None else min(most, _BOUNCE_RECORDS)

    def _copy(self, hold: Hold, targets: Sequence[Parts], after: Event | None) -> tuple[Event | None, list[Failure]]:
        """Enqueue copies of a host hold, as far as its records could be read; it is let go of when they are made."""
        reads = self._operations.loader
        lost = [failure.expert for failure in hold.failures]
        good = [number for number, expert in enumerate(hold.experts.tolist()) if expert not in lost]
        if not good:
            self.source.release(hold)
            return None, hold.failures
        slots = hold.slots[good]
        sources = self._put_aside(slots) if self._registered is None else self._in_place(slots)
        event = reads.demand(self.source, hold, copies([targets[number] for number in good], sources, after))
        self._bounced = event
        if not self.source.holds_overlap:
            reads.make_room(self.source, self.source.capacity)
        return event, hold.failures

    def _in_place(self, slots: NDArray[np.int32]) -> list[Parts]:
        return [tuple(component[slot] for component in self._components) for slot in slots.tolist()]

    def _put_aside(self, slots: NDArray[np.int32]) -> list[Parts]:
        """Copy slots to the first records of the buffer, when copies out of it have been made."""
        if self._bounced is not None:
            self._device.synchronize(self._bounced)
        for number, slot in enumerate(slots.tolist()):
            for buffer, component in zip(self._bounce, self._components, strict=True):
                buffer[number].copy_(component[slot])
        return [tuple(buffer[number] for buffer in self._bounce) for number in range(len(slots))]


def copies(targets: Sequence[Parts], sources: Sequence[Parts], after: Event | None = None) -> list[Copy]:
    """The copies of whole records, made after ``after``."""
    return [
        Copy(target, source, after)
        for record in zip(targets, sources, strict=True)
        for target, source in zip(*record, strict=True)
        if target.nbytes
    ]
