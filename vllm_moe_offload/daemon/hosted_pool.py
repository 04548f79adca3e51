"""One pool of a hosted model: gives every attached worker the experts it waits for, in slots that all of them share.

Cache decisions are taken under the pool's lock, reads are made outside of it. It must never hold the lock while it
waits for a disk or a worker, and never tell anyone of a slot whose record is not complete.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, ExpertCache, create_policy
from ..cache.cache import ABSENT
from ..errors import LoadError
from ..prefetch.loader import RecordLoader
from ..slots.base import guess_room, stream_share
from ..store.layout import RecordLayout
from ..store.pools import PoolMembers
from ..store.reader import Store
from .arena import Arena
from .guest import Guest, SharedForesight
from .hosted_load import HostedLoad, PoolCounters, Supply
from .occupancy import Occupancy
from .table import ResidencyTable
from .under_way import UnderWay

PATIENCE_SECONDS = 20.0
"""How long a demand waits for other workers to stop reading; its client gives up somewhat later."""
_POLL_SECONDS = 0.0005
_HINT_PATIENCE_SECONDS = 0.005
_FIRST_NAP_SECONDS = 20e-6
_LONGEST_NAP_SECONDS = 0.001


class HostedPool:
    """The slots of all layers of a store that have one layout, shared by the workers attached to it.

    Thread-safe: each worker's calls come from one thread, those of different workers at the same time.

    Args:
        name: for people who look at the process's memory.
        loader: shared by the pools of the store.
        limit: slots that may be occupied at first.
        stir: called when ``tend`` should soon be.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        layout: RecordLayout,
        loader: RecordLoader,
        policy: str,
        limit: int,
        stir: Callable[[], None],
    ):
        members = PoolMembers.of(store.layers, layout)
        self._size_of = dict(zip(members.layers, members.counts, strict=True))
        self.layout = layout
        self.experts = members.experts
        self.loader = loader
        self.lock = threading.Lock()
        self.arena = Arena.create(f"{name} experts", layout, self.experts)
        self.table = ResidencyTable.create(f"{name} table", self.experts, generation=time.time_ns())
        self._policy = SharedForesight(create_policy(policy, members.layer_of), self.table)
        self.cache = ExpertCache(members.layer_of, self.experts, self._policy, at_home=True)
        self.occupancy = Occupancy(self.cache, self.arena, self.table)
        self._turn = threading.Condition(self.lock)
        self._queue: deque[object] = deque()
        """Demands that wait for room, in the order in which they came."""
        self.under_way = UnderWay(store, members, self.cache, self.occupancy, self.arena, self.table, self._turn)
        self.guests: dict[int, Guest] = {}
        self._stir = stir
        self.limit = limit

    @property
    def limit(self) -> int:
        """Slots that may be occupied. Lowering it takes effect as readers leave, in ``tend``."""
        return self.cache.limit

    @limit.setter
    def limit(self, slots: int) -> None:
        with self.lock:
            self.cache.limit = self.table.limit = slots
        self._stir()

    @property
    def largest_layer(self) -> int:
        """Experts of the layer that has most."""
        return max(self._size_of.values())

    @property
    def held(self) -> int:
        """Slots that take memory."""
        with self.lock:
            return self.occupancy.held

    @property
    def resident(self) -> int:
        """Experts whose records are complete."""
        with self.lock:
            return self.cache.occupied - len(self.under_way.loads)

    @property
    def counters(self) -> PoolCounters:
        return self.under_way.counters

    def admit(self, worker: int) -> None:
        """A worker comes."""
        with self.lock:
            self.guests[worker] = Guest(self.table, worker)
            self._policy.workers = list(self.guests)

    def dismiss(self, worker: int) -> None:
        """A worker has gone, however: nothing is kept for it any more. Idempotent."""
        with self.lock:
            guest = self.guests.pop(worker, None)
            if guest is not None:
                guest.release_all(self.cache)
                self._policy.workers = list(self.guests)
                self._turn.notify_all()
        self._stir()

    def demand(self, worker: int, ticket: int, experts: NDArray[np.int32], stream: bool = False) -> Supply:
        """Bring ``experts`` into slots and keep them there until the worker is done with ``ticket``. Blocks.

        Raises:
            ValueError: an id is out of range or given twice, the ticket does not rise, or they can never fit.
            LoadError: other workers did not stop reading in time.
        """
        self.check_ids(experts)
        with self.lock:
            guest = self.guests[worker]
            self._check(guest, ticket, len(experts))
            guest.last_ticket = ticket
            acquired = self._acquire_in_turn(experts, stream)
            joined = self._join(worker, experts) if self.under_way.loads else []
            own = self.under_way.begin(acquired)
            self.counters.demands += 1
            self.counters.joined += len(joined)
            self.counters.missed_bytes += (len(own) + len(joined)) * self.layout.payload_bytes
            self.occupancy.show_again(experts, self.under_way.loads)
            clear = self.occupancy.are_clear(acquired.missing_slots)
            if own and self.occupancy.running_low:
                self._stir()
        if own or joined:
            self.read(own, joined, clear)
        return self._supply(guest, ticket, experts, acquired.slots, own, joined)

    def hint(self, worker: int, experts: NDArray[np.int32], stream: bool = False) -> int:
        """Start loading ``experts`` (best first, of one layer) where slots can be spared. Returns how many.

        Raises:
            ValueError: an id is out of range or given twice.
        """
        self.check_ids(experts)
        if len(experts) == 0:
            return 0
        with self.lock:
            self.release_done()
            slots = self.cache.slot_of[experts]
            resident, absent = experts[slots != ABSENT], experts[slots == ABSENT]
            self.cache.keep(resident)
            self.occupancy.show_again(resident, self.under_way.loads)
            started = self._stream_ahead(absent) if stream else self._guess(absent, resident)
            self._note_evicted(started)
            loads = self.under_way.begin(started, None if stream else worker, pinned=True)
            clear = self.occupancy.are_clear(started.missing_slots)
        if not clear and not self._await_clear(loads, _HINT_PATIENCE_SECONDS):
            loads = self._ready(self._drop_unwanted(loads))
        self.loader.start(self.under_way.allocate(loads), guesses=not stream)
        if self.occupancy.running_low:
            self._stir()
        return len(loads)

    def tend(self) -> bool:
        """Do what nobody waits for: hear of uses, keep slots clear, shrink. Returns whether something is left to do."""
        with self.lock:
            self.release_done()
            self._hear_of_uses()
            self.occupancy.make_room()
            return not self.occupancy.settled

    def read(self, own: list[HostedLoad], joined: list[HostedLoad], clear: bool = False) -> None:
        """Wait until ``own`` have been read and ``joined`` have arrived. Not under the lock.

        Args:
            clear: the slots of ``own`` are known to be clear.
        """
        ready = self.under_way.allocate(own if clear else self._ready(own))
        queued = self.loader.withdraw(joined) if joined else []
        self.loader.demand([*ready, *queued])
        self.loader.join(joined)

    def prepare(self, loads: list[HostedLoad]) -> list[HostedLoad]:
        """Those of ``loads`` into whose slots something may be copied; the others have failed. Not under the lock."""
        return self.under_way.allocate(self._ready(loads), copying=True)

    def freeze(self) -> None:
        """The daemon ends: what workers have seen stays true, and may outlive it."""
        with self.lock:
            self.occupancy.freeze()

    def release_done(self) -> None:
        """Unpin what workers have finished computing on. Under the lock."""
        released = [guest.release_done(self.cache) for guest in self.guests.values()]
        if self._queue and any(released):
            self._turn.notify_all()

    def _hear_of_uses(self) -> None:
        for guest in self.guests.values():
            used = guest.tell_uses(self._policy)
            if len(used):
                self.under_way.note_used(used)

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
            self.occupancy.check_integrity(self.under_way.loads)
            assert np.flatnonzero(self.table.loading).tolist() == sorted(self.under_way.loads)

    def _check(self, guest: Guest, ticket: int, count: int) -> None:
        if ticket <= guest.last_ticket:
            raise ValueError(f"ticket {ticket} does not rise above {guest.last_ticket}")
        if count > self.limit:
            raise ValueError(
                f"a demand of {count} experts: at most {self.limit} of this pool fit at present; ask for fewer at a "
                "time, or give the daemon a larger --cache"
            )

    def _acquire_in_turn(self, experts: NDArray[np.int32], stream: bool) -> Acquisition:
        """Pin ``experts``, waiting until others hold so little that they fit. Those who wait come in order."""
        if stream:  # what has streamed through goes first, but not while it is pinned
            self.release_done()
        acquired = None if self._queue else self._try_to_acquire(experts, stream)
        if acquired is not None:
            return acquired
        self.release_done()
        turn = object()
        self._queue.append(turn)
        deadline = time.monotonic() + PATIENCE_SECONDS
        try:
            while time.monotonic() < deadline:
                self._turn.wait(_POLL_SECONDS)
                self.release_done()
                if self._queue[0] is turn and (acquired := self._try_to_acquire(experts, stream)) is not None:
                    return acquired
        finally:
            self._queue.remove(turn)
            self._turn.notify_all()
        holding = [worker for worker, guest in self.guests.items() if guest.holds]
        raise LoadError(
            f"{len(experts)} experts do not fit into {self.limit} slots beside what workers {holding} have been "
            f"computing on for {PATIENCE_SECONDS:.0f} s; give the daemon a larger --cache"
        )

    def _try_to_acquire(self, experts: NDArray[np.int32], stream: bool) -> Acquisition | None:
        if stream and len(experts) and self.limit < self.experts:
            streamed = self.cache.stream(experts, self._share(experts))
            self._note_evicted(streamed)
            if (streamed.slots != ABSENT).all():
                return streamed
            self.cache.release(streamed.slots[streamed.slots != ABSENT])
            self.cache.forget(streamed.missing)
            self.occupancy.soil(streamed.missing_slots)
        try:
            acquired = self.cache.acquire(experts, use=False)
        except ValueError:
            return None
        self._note_evicted(acquired)
        return acquired

    def _note_evicted(self, acquired: Acquisition) -> None:
        if len(acquired.evicted):
            self.occupancy.hide(acquired.evicted)
            if self.under_way.any_unused(acquired.evicted):
                self._hear_of_uses()
                self.under_way.note_evicted(acquired.evicted)

    def _join(self, worker: int, experts: NDArray[np.int32]) -> list[HostedLoad]:
        """The loads under way of ``experts``; wrong guesses whose reading has not begun are taken back."""
        joined = self.under_way.wait_for(experts)
        if len(experts):
            for load in self.loader.withdraw(self.under_way.wrong_guesses(worker, experts)):
                assert isinstance(load, HostedLoad)
                self.under_way.take_back(load)
        return joined

    def _stream_ahead(self, absent: NDArray[np.int32]) -> Acquisition:
        if self.limit < self.experts and len(absent):
            started = self.cache.stream(absent, self._share(absent))
        else:
            started = self.cache.admit(absent)
        self.counters.streamed += len(started.missing)
        return started

    def _guess(self, absent: NDArray[np.int32], resident: NDArray[np.int32]) -> Acquisition:
        if len(absent) == 0:
            return self.cache.admit(absent)
        room = guess_room(self.limit, self._layer_size(absent), len(self.under_way.loads))
        clear = max(0, self.limit - self.cache.occupied) + self.occupancy.clear_retired()
        # without waiting, and leaving half of the reserve to demands
        room = max(0, min(room, clear - self.occupancy.reserve // 2))
        return self.cache.admit(absent[:room], protect=resident)

    def _layer_size(self, experts: NDArray[np.int32]) -> int:
        return self._size_of[self.under_way.layer_of[int(experts[0])]]

    def _share(self, experts: NDArray[np.int32]) -> int:
        return stream_share(self.limit, self._layer_size(experts))

    def _supply(
        self,
        guest: Guest,
        ticket: int,
        experts: NDArray[np.int32],
        slots: NDArray[np.int32],
        own: list[HostedLoad],
        joined: list[HostedLoad],
    ) -> Supply:
        """Pin what has come until the ticket is done. The pins of what has failed are void already."""
        failed = [(load.flat, load.error) for load in (*own, *joined) if load.error is not None]
        for expert, _ in failed:
            slots[experts == expert] = ABSENT
        with self.lock:
            guest.keep(ticket, slots[slots != ABSENT] if failed else slots)
        return Supply(slots, len(own), len(joined), failed)

    def _ready(self, loads: list[HostedLoad]) -> list[HostedLoad]:
        """Those whose slots may be written, after waiting for it; the others fail. All or none."""
        if not loads or self._await_clear(loads, PATIENCE_SECONDS):
            return loads
        workers = self.occupancy.holders()
        self.under_way.fail(loads, f"workers {workers} have been reading its slot for {PATIENCE_SECONDS:.0f} s")
        return []

    def _await_clear(self, loads: list[HostedLoad], patience: float) -> bool:
        """Whether nobody reads the slots of ``loads`` any more, at the latest after ``patience`` seconds."""
        slots = np.array([load.slot for load in loads], dtype=np.int32)
        nap, deadline = _FIRST_NAP_SECONDS, time.monotonic() + patience
        while True:
            with self.lock:
                if self.occupancy.are_clear(slots):
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_SECONDS)

    def _drop_unwanted(self, loads: list[HostedLoad]) -> list[HostedLoad]:
        """Give up those that nobody waits for; returns the others."""
        with self.lock:
            wanted = [load for load in loads if self.cache.pins[load.slot] > 1]
            for load in loads:
                if self.cache.pins[load.slot] == 1:
                    self.under_way.forget(load)
        return wanted
