"""Which slots of a pool workers may be reading, and when one is nobody's any more: the states of a slot.

Its caller holds the pool's lock. It must never let a slot be written that somebody may still be reading, and never
trust the table, which workers can write.

FREE         no expert, no pages.
DIRTY        no expert, perhaps pages, which ``run_maintenance`` gives back unless the slot is taken first.
LOADING      given to an expert whose record is not complete; not in the table. Pinned by the load or a demand.
PUBLISHED    complete, and in the table: any worker may begin to read it at any time, without asking.
RETIRED      complete, and out of the table; who found it before may still be reading it.
UNPUBLISHED  complete, and out of the table; who may have found it has left since (epochs.py). Only who has pinned it
             reads it.

FREE, DIRTY           -> LOADING      ``ExpertCache.acquire``, ``admit``, ``stream``, then ``InFlightLoads.begin``
LOADING               -> PUBLISHED    ``publish``, when the load has ended (``InFlightLoads._arrived``)
LOADING               -> UNPUBLISHED  the same while more slots are occupied than the limit allows
LOADING               -> DIRTY        ``InFlightLoads.forget`` and ``disown``: the load failed or is not wanted any more
PUBLISHED             -> RETIRED      ``retire``: another expert, the reserve or the limit needs the slot
RETIRED               -> UNPUBLISHED  ``reclaim``
RETIRED, UNPUBLISHED  -> PUBLISHED    ``republish``, ``publish_rest``: its expert is asked for again, or may stay
UNPUBLISHED           -> LOADING      as from FREE, with another expert, where it is not pinned
UNPUBLISHED           -> DIRTY        ``run_maintenance`` above the limit, and ``lease``, where it is not pinned
FREE, DIRTY           -> UNPUBLISHED  ``lease`` has moved an expert there, under the lock
DIRTY                 -> FREE         ``run_maintenance``

So a slot is written only where nobody can be reading it. Pins are apart from states: they only keep a slot from being
given away and emptied. After ``freeze`` no slot leaves RETIRED or PUBLISHED any more.
"""

from collections.abc import Container
from enum import Enum

import numpy as np

from ..cache import ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT, FREE
from ..ipc.arena import Arena
from ..ipc.epochs import Reclaimer
from ..ipc.table import ResidencyTable

_RESERVE_SHARE = 50
_RESERVE_LEAST = 8
_RESERVE_MOST_SHARE = 8


class SlotState(Enum):
    """See the module."""

    FREE = "free"
    DIRTY = "dirty"
    LOADING = "loading"
    PUBLISHED = "published"
    RETIRED = "retired"
    UNPUBLISHED = "unpublished"


class SlotReclaimer:
    """Keeps arena and table of a pool as its cache wants them: see the module for what a slot goes through.

    To the cache a slot is *exposed* while it is PUBLISHED or RETIRED; it gives away no slot that is.

    While more slots are occupied than the limit allows, nothing is published: what is there beyond the limit can leave
    as soon as nobody has pinned it, whoever else is reading.
    """

    def __init__(self, cache: ExpertCache, arena: Arena, table: ResidencyTable):
        self._cache = cache
        self._arena = arena
        self._table = table
        self._epochs = Reclaimer(table)
        self.published_in = np.full(table.experts, ABSENT, dtype=np.int32)
        """What the table's ``slot_of`` should be."""
        self._readers_left = np.zeros(arena.slots, dtype=np.int32)
        """How often each slot has been retired while somebody may have been reading it who may still do so."""
        self.withheld: set[int] = set()
        """Experts that are not published, since they are going to be moved."""
        self._dirty: set[int] = set()
        """Slots with pages and perhaps without an expert."""

    def publish(self, experts: IntArray) -> None:
        """Their records are complete in the slots the cache gave them: let workers find them, if the limit allows."""
        if self._cache.occupied > self._cache.limit:
            return
        if self.withheld:
            experts = experts[[expert not in self.withheld for expert in experts.tolist()]]
        slots = self._cache.slot_of[experts]
        assert (slots != ABSENT).all() and (self.published_in[experts] == ABSENT).all()
        self._cache.exposed[slots] = True
        self._epochs.publish(experts, slots)
        self.published_in[experts] = slots

    def republish(self, experts: IntArray, loading: Container[int]) -> None:
        """Publish those of ``experts`` that are RETIRED or UNPUBLISHED."""
        hidden = experts[self.published_in[experts] == ABSENT].tolist()
        complete = [one for one in hidden if one not in loading and self._cache.slot_of[one] != ABSENT]
        if complete:
            self.publish(np.array(complete))

    def freeze(self) -> None:
        """The daemon ends: what workers have seen stays where it is."""
        self._epochs.freeze()
        self._table.freeze()

    def publish_rest(self, loading: Container[int]) -> None:
        """Publish what could not be while too much was occupied, and is not going to leave."""
        hidden = np.flatnonzero((self._cache.slot_of != ABSENT) & (self.published_in == ABSENT))
        if len(hidden):
            staying = [slot not in self._cache.retired for slot in self._cache.slot_of[hidden].tolist()]
            self.republish(hidden[staying], loading)

    def retire(self, experts: IntArray) -> None:
        """Nobody shall begin to read ``experts``, as far as they are published."""
        published = [expert for expert in experts.tolist() if self.published_in[expert] != ABSENT]
        if published:
            slots = self.published_in[published]
            assert self._cache.exposed[slots].all()
            self._epochs.retire(np.array(published), slots)
            self.published_in[published] = ABSENT
            self._readers_left[slots] += 1

    def withhold(self, experts: IntArray) -> None:
        """Retire ``experts`` and publish them no more, so that in the end nobody reads their slots; perhaps at once."""
        self.withheld.update(experts.tolist())
        self.retire(experts)
        self.reclaim()

    def reclaim(self) -> None:
        """Find out which RETIRED slots nobody can be reading any more: they are UNPUBLISHED then."""
        slots = self._epochs.reclaim()
        if len(slots):
            np.subtract.at(self._readers_left, slots, 1)
            assert (self._readers_left[slots] >= 0).all()
            self._cache.exposed[slots] = self._readers_left[slots] > 0
            again = self.published_in[self._cache.expert_of[slots]] == slots
            self._cache.exposed[slots] |= again & (self._cache.expert_of[slots] != FREE)

    def held_up(self, seconds: float) -> bool:
        """Whether a worker has for so long been reading what has been retired. To be asked after ``reclaim``."""
        return self._epochs.waiting_seconds > seconds

    def mark_dirty(self, slots: IntArray) -> None:
        """These slots have been, or may have been, written, and their experts forgotten."""
        assert not self._cache.exposed[slots].any()
        self._dirty.update(slots.tolist())

    @property
    def reserve(self) -> int:
        """How many slots should be on their way out before they are needed; 0 where every expert has a place."""
        limit = self._cache.limit
        if limit >= self._cache.num_slots:
            return 0
        return min(max(_RESERVE_LEAST, limit // _RESERVE_SHARE), limit // _RESERVE_MOST_SHARE)

    @property
    def running_low(self) -> bool:
        """Whether demands will soon have to wait until nobody reads some slots any more."""
        room = max(0, self._cache.limit - self._cache.occupied)
        return room + len(self._cache.retired) <= self.reserve // 2

    @property
    def held(self) -> int:
        """Slots that take memory."""
        return self._cache.occupied + sum(self._cache.expert_of[slot] == FREE for slot in self._dirty)

    @property
    def settled(self) -> bool:
        """Nothing has to be emptied."""
        return not self._dirty and self._cache.occupied <= self._cache.limit

    def run_maintenance(self) -> None:
        """Retire what the reserve lacks or the limit forbids, and empty what may be emptied."""
        cache = self._cache
        self.reclaim()
        surplus = max(0, cache.occupied - cache.limit)
        room = max(0, cache.limit - cache.occupied)
        leaving = self._leaving()
        lacking = surplus + max(0, self.reserve - room) - len(leaving)
        if lacking > 0 and (surplus or self.running_low):
            self.retire(cache.retire(lacking))
            self.reclaim()
            leaving = self._leaving()
        if surplus:
            self._empty(leaving[~cache.exposed[leaving]][:surplus])
        self._punch()

    def _leaving(self) -> IntArray:
        """Unpinned slots that are retired or can be emptied at once, in the order in which they shall leave."""
        cache = self._cache
        retired = np.array(list(cache.retired), dtype=np.int32)
        hidden = np.flatnonzero((cache.expert_of != FREE) & (cache.pins == 0) & ~cache.exposed)
        return np.concatenate([retired[cache.pins[retired] == 0], hidden[~np.isin(hidden, retired)]])

    def _empty(self, slots: IntArray) -> None:
        self._cache.forget(self._cache.expert_of[slots])
        self.mark_dirty(slots)

    def _punch(self) -> None:
        """Give the pages of DIRTY slots back: they are FREE then."""
        for slot in list(self._dirty):
            if self._cache.expert_of[slot] != FREE:
                self._dirty.remove(slot)
            else:
                self._arena.punch(slot)
                self._dirty.remove(slot)

    def state_of(self, slot: int, loading: Container[int]) -> SlotState:
        """Args: loading: experts whose loads have not ended."""
        expert = int(self._cache.expert_of[slot])
        if expert == FREE:
            return SlotState.DIRTY if slot in self._dirty else SlotState.FREE
        if expert in loading:
            return SlotState.LOADING
        if self.published_in[expert] == slot:
            return SlotState.PUBLISHED
        return SlotState.RETIRED if self._readers_left[slot] else SlotState.UNPUBLISHED

    def check_integrity(self, loading: Container[int]) -> None:
        """Assert that what workers see is what the cache means. For tests."""
        self._cache.check_integrity()
        published = np.flatnonzero(self.published_in != ABSENT)
        assert (self._table.slot_of == self.published_in).all()
        assert (self._cache.slot_of[published] == self.published_in[published]).all()
        states = [self.state_of(slot, loading) for slot in range(self._arena.slots)]
        for slot, state in enumerate(states):
            self._check_state(slot, state)
        assert states.count(SlotState.PUBLISHED) == len(published)

    def _check_state(self, slot: int, state: SlotState) -> None:
        """What follows from the state of a slot."""
        cache = self._cache
        exposed = state in (SlotState.PUBLISHED, SlotState.RETIRED)
        assert cache.exposed[slot] == exposed, f"a slot is {state.value} and the cache has it otherwise"
        if state is SlotState.FREE:
            assert not self._arena.allocated[slot], "a slot that has pages is taken for one without"
        if state is SlotState.LOADING:
            assert cache.pins[slot], "what is being written could be given away"
            assert not self._readers_left[slot], "what is being written may be read"
        if state is SlotState.PUBLISHED:
            assert slot not in cache.retired, "what shall leave can be found"
