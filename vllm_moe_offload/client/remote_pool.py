"""A pool whose slots belong to the daemon: this process reads them in place and asks for what is not there.

It must never write the arena, and holds nothing while it waits: workers cannot wait for each other in a ring.
"""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..cache.base import IntArray
from ..cache.outcomes import SpeculativeLoads, speculative_room
from ..errors import LoadError
from ..ipc.arena import Arena
from ..ipc.epochs import Reader
from ..ipc.protocol import Demand, Hint, Supplied, pack_ids, unpack_ids
from ..ipc.table import ABSENT, ATTACHED, DONE, ResidencyTable
from ..ipc.uses import STEP, UseWriter
from ..load_report import NOTHING, LoadReport
from ..pool.base import Failure, Hold, HostPool, PoolGoneError, Span
from ..pool.loader import DamagedRecordError
from ..stats import Stats
from .connection import Connection, DaemonGoneError, RefusedError

_STEP = np.array([STEP], dtype=np.int32)
_STEPS_BETWEEN_LOOKS_BACK = 16


class _TicketHold(Hold):
    """What the daemon keeps in place until its ticket is done; ticket 0 is the worker's own epoch."""

    __slots__ = ("ticket",)

    def __init__(self, experts: IntArray, slots: NDArray[np.int32], ticket: int):
        super().__init__(experts, slots)
        self.ticket = ticket


class RemotePool(HostPool):
    """One pool of a model this worker is attached to.

    It is gone when the daemon is, does not answer, refuses, or has detached this worker.

    Args:
        number: of the pool in the protocol.
        worker: this worker's entry in the table.
        tickets: rising, for all pools of this worker.
        stats: this worker's, for everybody to see.
        lease: the daemon has promised to leave all slots alone.
    """

    holds_overlap = False

    def __init__(
        self,
        connection: Connection,
        number: int,
        arena: Arena,
        table: ResidencyTable,
        worker: int,
        tickets: Iterator[int],
        stats: Stats,
        lease: bool,
    ):
        self.memory = arena
        self.experts = table.experts
        self.table = table
        self._connection = connection
        self._number = number
        self._lease = lease
        self._counted = stats
        self._record_bytes = arena.layout.payload_bytes
        self._reader = Reader(table, worker)
        self._uses = UseWriter(table, worker)
        self._entry = table.entries[worker].data
        self._admission = self._entry[ATTACHED]
        self._check_attached()
        self._expected = table.expected[worker]
        self._stats = table.stats[worker]
        self._predictions_enabled = False
        self._tickets = tickets
        self._speculative = SpeculativeLoads()
        self._asked: set[int] = set()
        """Speculative loads of the running step: the daemon may not have taken notice of them yet."""
        self._steps = 0

    @property
    def is_attached(self) -> bool:
        """Whether the daemon still keeps what this worker reads."""
        return bool(self._admission and self._entry[ATTACHED] == self._admission)

    @property
    def capacity(self) -> int:
        return self.table.limit

    @property
    def pages_stay(self) -> bool:
        """Without a lease the daemon gives the pages of emptied slots back, and fills other pages later."""
        return self._lease

    def begin_step(self) -> LoadReport:
        self._uses.note(_STEP)
        self._steps += 1
        self._asked.clear()
        if self._number == 0:
            self._stats[:] = self._counted.to_words()
        if not self._predictions_enabled:
            return NOTHING
        self._expected[:] = 0
        return self._look_back() if self._steps % _STEPS_BETWEEN_LOOKS_BACK == 0 else NOTHING

    def load_all(self) -> LoadReport:
        """The daemon has done it, or it would not have granted the lease."""
        return NOTHING

    def hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        self._check_attached()
        self._reader.enter()
        # detached in between, its epoch does not count, and another worker's entry must not be touched
        self._check_attached()
        slots = self.table.slot_of[experts]
        if (slots == ABSENT).any():
            self._reader.leave()
            return self._demand(experts, stream=False)
        self._uses.note(experts)
        useful, _ = self._use(experts, slots)
        return _TicketHold(experts, slots, ticket=0), LoadReport(hits=len(experts), useful=useful)

    def hold_resident(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        self._reader.enter()
        slots = self.table.slot_of[experts]
        there = (slots != ABSENT) & self.is_attached
        hold = _TicketHold(experts[there], slots[there], ticket=0)
        return hold, LoadReport(withdrawn=self._speculative.use(hold.experts))

    def hold_streaming(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        return self._demand(experts, stream=True)

    def stream_ahead(self, layer: Span) -> LoadReport:
        absent = layer.start + np.flatnonzero(self.absent(layer))
        if len(absent) and self._hint(absent, stream=True):
            return LoadReport(streamed=len(absent))
        return NOTHING

    def settle(self, layer: Span) -> LoadReport:
        """Nothing to wait for: the daemon finds the slots."""
        return NOTHING

    def start_hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        absent = experts[self.table.slot_of[experts] == ABSENT]
        if len(absent):
            self._hint(absent, stream=False)
        return Hold(experts, np.empty(0, np.int32)), NOTHING

    def finish_hold(self, layer: Span, hold: Hold) -> tuple[Hold, LoadReport]:
        return self._demand(hold.experts, stream=False)

    def abandon(self, hold: Hold) -> LoadReport:
        """It was only a hint."""
        return NOTHING

    def release(self, hold: Hold) -> None:
        assert isinstance(hold, _TicketHold)
        if not self.is_attached:  # the entry may be another worker's by now
            error = slots_taken_back()
            hold.failures = [Failure(expert, error) for expert in hold.experts.tolist()]
        elif hold.ticket:
            self._entry[DONE] = hold.ticket
        else:
            self._reader.leave()

    def absent(self, layer: Span) -> NDArray[np.bool_]:
        span = slice(layer.start, layer.stop)
        absent = (self.table.slot_of[span] == ABSENT) & (self.table.loading[span] == 0)
        for expert in self._asked:
            if expert in layer:
                absent[expert - layer.start] = False
        return absent

    def enable_predictions(self) -> None:
        self._predictions_enabled = True

    def expect(self, layer: Span, probabilities: NDArray[np.float32] | float) -> None:
        self._expected[layer.start : layer.stop] = probabilities

    def prefetch(self, layer: Span, experts: IntArray) -> LoadReport:
        wanted = experts[: speculative_room(self.capacity, len(layer), len(self._asked))]
        if not len(wanted) or not self._hint(wanted, stream=False):
            return NOTHING
        self._speculative.start(wanted)
        self._asked.update(wanted.tolist())
        return LoadReport(started=len(wanted))

    def queued(self) -> int:
        return int(np.count_nonzero(self.table.loading))

    def close(self) -> None:
        """The session ends the connection of all pools."""

    def _check_attached(self) -> None:
        if not self.is_attached:
            raise PoolGoneError("the daemon has detached this worker")

    def _demand(self, experts: IntArray, stream: bool) -> tuple[Hold, LoadReport]:
        ticket = next(self._tickets)
        before = self.table.slot_of[experts]
        started = time.perf_counter()
        try:
            reply = self._connection.request(Demand(ticket, self._number, pack_ids(experts), stream))
        except (DaemonGoneError, RefusedError) as error:
            raise PoolGoneError(str(error)) from error
        waited = time.perf_counter() - started
        slots = unpack_ids(reply.slots)
        if reply.ticket != ticket or len(slots) != len(experts):
            raise PoolGoneError(f"the daemon answered ticket {reply.ticket} instead of {ticket}")
        self._uses.note(experts)
        hold = _TicketHold(experts, np.maximum(slots, 0), ticket)
        hold.failures = [Failure(f.expert, _error(f.reason, f.damaged)) for f in reply.failed]
        return hold, self._report(experts, before, reply, waited)

    def _report(self, experts: IntArray, before: NDArray[np.int32], reply: Supplied, waited: float) -> LoadReport:
        """``before``: where the experts were when they were asked for."""
        missed = reply.loaded + reply.joined
        useful, late = self._use(experts, before)
        return LoadReport(
            hits=len(experts) - missed,
            misses=missed,
            loads=reply.loaded,
            loaded_bytes=reply.loaded * self._record_bytes,
            failed=len(reply.failed),
            waited=waited,
            demanded=reply.loaded,
            demand_seconds=waited if reply.loaded else 0.0,
            useful=useful,
            late=late,
            late_seconds=waited if late else 0.0,
        )

    def _use(self, experts: IntArray, slots: NDArray[np.int32]) -> tuple[int, int]:
        """How many of ``experts`` were loaded speculatively and are there, and how many are not there yet.

        Args:
            slots: where the experts were when they were asked for.
        """
        if not self._predictions_enabled:
            return 0, 0
        late = self._speculative.use(experts[slots == ABSENT])
        return self._speculative.use(experts), late

    def _look_back(self) -> LoadReport:
        """Speculative loads that are neither there nor on their way have been evicted unused."""
        unused = self._speculative.unused
        lost = unused[(self.table.slot_of[unused] == ABSENT) & (self.table.loading[unused] == 0)]
        return LoadReport(wasted=self._speculative.evict(lost))

    def _hint(self, experts: IntArray, stream: bool) -> bool:
        """Returns whether there was a daemon to be told. Whoever waits for the experts finds out as well."""
        try:
            self._connection.send(Hint(self._number, pack_ids(experts), stream))
        except DaemonGoneError:
            return False
        return True


def slots_taken_back() -> LoadError:
    """What was computed meanwhile is void."""
    return LoadError("the daemon took back its slots while they were read")


def _error(reason: str, damaged: bool) -> LoadError:
    return DamagedRecordError(reason) if damaged else LoadError(reason)
