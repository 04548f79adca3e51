"""A pool of a model in the daemon: gives every attached worker the experts it waits for, in slots that all share.

Cache decisions are taken under the pool's lock, reads are made outside of it. It must never hold the lock while it
waits for a disk or a worker, never make one worker wait until another goes on, and never tell anyone of a slot whose
record is not complete.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, ExpertCache, create_policy
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..ipc.arena import Arena
from ..ipc.table import ResidencyTable
from ..pool.loader import RecordLoader
from ..stats import Stats
from ..store.layout import RecordLayout
from ..store.pools import PoolMembers
from ..store.reader import Store
from .loads import DaemonLoad, InFlightLoads, Supply
from .pins import WorkerPins
from .placement import Placement
from .reclaim import SlotReclaimer
from .shared_policy import SharedPredictions


class DaemonPool:
    """The slots of all layers of a store that have one layout, shared by the workers attached to it.

    Thread-safe: each worker's calls come from one thread, those of different workers at the same time.

    Args:
        name: for people who look at the process's memory.
        loader: shared by the pools of the store.
        limit: slots that may be occupied at first.
        request_maintenance: called when ``run_maintenance`` should be called soon.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        layout: RecordLayout,
        loader: RecordLoader,
        policy: str,
        limit: int,
        request_maintenance: Callable[[], None],
    ):
        members = PoolMembers.of(store.layers, layout)
        self.largest_layer = max(members.counts)
        """Experts of the layer that has most."""
        self.layout = layout
        self.experts = members.experts
        self.loader = loader
        self.lock = threading.Lock()
        self.arena = Arena.create(f"{name} experts", layout, self.experts)
        self.table = ResidencyTable.create(f"{name} table", self.experts)
        self._policy = SharedPredictions(create_policy(policy, members.layer_of), self.table)
        self.cache = ExpertCache(members.layer_of, self.experts, self._policy, at_home=True)
        self.reclaimer = SlotReclaimer(self.cache, self.arena, self.table)
        self._turn = threading.Condition(self.lock)
        self.in_flight = InFlightLoads(members, self.cache, self.reclaimer, self.arena, self.table, self._turn)
        self.pins: dict[int, WorkerPins] = {}
        """Of the attached workers, by entry."""
        layer_sizes = np.repeat(members.counts, members.counts)
        self.placement = Placement(self.cache, self.reclaimer, layer_sizes, self.pins, self._turn, self._note_evicted)
        self._request_maintenance = request_maintenance
        self.limit = limit

    @property
    def limit(self) -> int:
        """Slots that may be occupied. Lowering it takes effect as readers leave, in ``run_maintenance``."""
        return self.cache.limit

    @limit.setter
    def limit(self, slots: int) -> None:
        with self.lock:
            self.cache.limit = self.table.limit = slots
        self._request_maintenance()

    @property
    def held(self) -> int:
        """Slots that take memory."""
        with self.lock:
            return self.reclaimer.held

    @property
    def resident(self) -> int:
        """Experts whose records are complete."""
        with self.lock:
            return self.cache.occupied - len(self.in_flight.loads)

    @property
    def stats(self) -> Stats:
        return self.in_flight.stats

    def admit(self, worker: int) -> None:
        """A worker comes."""
        with self.lock:
            assert worker not in self.pins, "the entry has been given to two workers"
            self.pins[worker] = WorkerPins(self.table, worker)
            self._policy.workers = list(self.pins)

    def dismiss(self, worker: int) -> None:
        """A worker has gone, however: nothing is kept for it any more. Idempotent."""
        with self.lock:
            pins = self.pins.pop(worker, None)
            if pins is not None:
                pins.release_all(self.cache)
                self._policy.workers = list(self.pins)
                self._turn.notify_all()
        self._request_maintenance()

    def end_lease(self, worker: int) -> None:
        """The worker does not compute on experts without asking. Idempotent."""
        with self.lock:
            self.pins[worker].end_lease(self.cache)
            self._turn.notify_all()

    def demand(self, worker: int, ticket: int, experts: NDArray[np.int32], stream: bool = False) -> Supply:
        """Bring ``experts`` into slots and keep them there until the worker is done with ``ticket``. Blocks.

        Raises:
            ValueError: an id is out of range or given twice, the ticket does not rise, or they are too many.
        """
        self.check_ids(experts)
        with self.lock:
            pins = self.pins[worker]
            self._check(pins, ticket, len(experts))
            pins.last_ticket = ticket
            demand = self._open_demand(worker, experts, stream)
        try:
            self.loader.join(demand.loads)
            return self._supply(pins, ticket, experts, demand)
        except BaseException:
            with self.lock:
                self._abort(demand)
            raise

    def hint(self, worker: int, experts: NDArray[np.int32], stream: bool = False) -> int:
        """Start loading ``experts`` (best first, of one layer) where slots can be spared. Returns how many.

        Raises:
            ValueError: an id is out of range or given twice.
        """
        self.check_ids(experts)
        if len(experts) == 0:
            return 0
        with self.lock:
            self.placement.release_done()
            slots = self.cache.slot_of[experts]
            resident, absent = experts[slots != ABSENT], experts[slots == ABSENT]
            self.cache.keep(resident)
            self.reclaimer.republish(resident, self.in_flight.loads)
            if stream:
                started = sum(len(self.begin(ahead, pinned=True)) for ahead in self.placement.stream_ahead(absent))
                self.stats.streamed += started
            else:
                ahead = self.placement.place_speculative(absent, resident, len(self.in_flight.loads))
                started = len(self.begin(ahead, worker, pinned=True))
        if self.reclaimer.running_low:
            self._request_maintenance()
        return started

    def run_maintenance(self) -> bool:
        """Collect uses, retire a reserve, shrink to the limit. Returns whether something is left to do soon."""
        with self.lock:
            self.placement.release_done()
            self._collect_uses()
            self.reclaimer.run_maintenance()
            self.reclaimer.publish_rest(self.in_flight.loads)
            return not self.reclaimer.settled

    def begin(
        self, acquired: Acquisition, speculated_by: int | None = None, pinned: bool = False, joined: bool = False
    ) -> list[DaemonLoad]:
        """Load what an acquisition asks for; see ``DaemonLoad`` and ``start`` for the arguments. Under the lock.

        The loader has the loads before anybody can see them: whoever joins one waits for no other thread to start it.
        """
        try:
            begun = self.in_flight.begin(acquired, speculated_by, pinned)
        except BaseException:
            self.in_flight.disown(acquired, [])
            raise
        self.loader.start(begun, speculative=speculated_by is not None, joined=joined)
        return begun

    def freeze(self) -> None:
        """The daemon ends: what workers have seen stays true, and may outlive it."""
        with self.lock:
            self.reclaimer.freeze()

    def _collect_uses(self) -> None:
        for pins in self.pins.values():
            used = pins.report_uses(self._policy)
            if len(used):
                self.in_flight.note_used(used)

    def check_ids(self, experts: NDArray[np.int32]) -> None:
        """Raises ``ValueError`` unless they are distinct experts of this pool."""
        ids = experts.tolist()
        if len(set(ids)) < len(ids):
            raise ValueError("an expert is named twice")
        if ids and (min(ids) < 0 or max(ids) >= self.experts):
            raise ValueError(f"experts {min(ids)} to {max(ids)} are not all among the {self.experts} of this pool")

    def close(self) -> None:
        """Close what stands for the memory; it is free when nobody maps it any more."""
        self.arena.mapping.close()
        self.table.close()

    def check_integrity(self) -> None:
        """Assert the invariants. For tests."""
        with self.lock:
            self.reclaimer.check_integrity(self.in_flight.loads)
            assert np.flatnonzero(self.table.loading).tolist() == sorted(self.in_flight.loads)

    def _check(self, pins: WorkerPins, ticket: int, count: int) -> None:
        if ticket <= pins.last_ticket:
            raise ValueError(f"ticket {ticket} does not rise above {pins.last_ticket}")
        # the limit may have been lowered since the worker looked at it
        most = max(self.limit, self.largest_layer)
        if count > most:
            raise ValueError(f"a demand of {count} experts: at most {most} of this pool may be asked for at a time")

    def _open_demand(self, worker: int, experts: NDArray[np.int32], stream: bool) -> "_Demand":
        """Pin ``experts`` and see to it that all of them are under way."""
        demand = _Demand(self.placement.acquire(experts, stream), [], [])
        try:
            demand.joined.extend(self.in_flight.wait_for(experts))
            demand.own.extend(self.begin(demand.acquired, joined=True))
            self._take_back_mispredicted(worker, experts)
            self.stats.demands += 1
            self.stats.joined += len(demand.joined)
            self.stats.missed_bytes += len(demand.loads) * self.layout.payload_bytes
            self.reclaimer.republish(experts, self.in_flight.loads)
            if self.reclaimer.running_low or not self.reclaimer.settled:
                self._request_maintenance()
        except BaseException:
            self._abort(demand)
            raise
        return demand

    def _take_back_mispredicted(self, worker: int, experts: NDArray[np.int32]) -> None:
        """Those whose reading has not begun."""
        if len(experts) and self.in_flight.loads:
            for load in self.loader.withdraw(self.in_flight.mispredicted(worker, experts)):
                assert isinstance(load, DaemonLoad)
                self.in_flight.take_back(load)

    def _note_evicted(self, experts: IntArray) -> None:
        self.in_flight.stats.evictions += len(experts)
        if self.in_flight.speculative.includes_any(experts):
            self._collect_uses()
            self.in_flight.note_evicted(experts)

    def _supply(self, pins: WorkerPins, ticket: int, experts: NDArray[np.int32], demand: "_Demand") -> Supply:
        """Pin what has come until the ticket is done. The pins of what has failed are void already."""
        slots = demand.acquired.slots
        failed = [(load.flat, load.error) for load in demand.loads if load.error is not None]
        for expert, _ in failed:
            slots[experts == expert] = ABSENT
        with self.lock:
            pins.keep(ticket, slots[slots != ABSENT] if failed else slots)
        return Supply(slots, len(demand.own), len(demand.joined), failed)

    def _abort(self, demand: "_Demand") -> None:
        """Unpin what a demand had pinned that ends early. Under the lock."""
        self.loader.start(self.loader.withdraw(demand.own))  # nobody joins them now
        void = self.in_flight.disown(demand.acquired, demand.own)
        void += [load.slot for load in demand.joined if load.error is not None and not self.in_flight.has(load)]
        slots = demand.acquired.slots
        self.cache.release(slots[~np.isin(slots, void)])
        self._turn.notify_all()


class _Demand(NamedTuple):
    """What a demand has pinned and waits for."""

    acquired: Acquisition
    own: list[DaemonLoad]
    joined: list[DaemonLoad]

    @property
    def loads(self) -> list[DaemonLoad]:
        return [*self.own, *self.joined]
