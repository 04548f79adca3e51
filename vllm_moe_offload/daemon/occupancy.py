"""What a pool's cache has decided, carried out in the memory that workers read: shown, hidden, emptied.

Its caller holds the pool's lock. It must never let a slot be written that somebody may still be reading, and never
believe the table, which workers can write.
"""

from collections.abc import Container

import numpy as np

from ..cache import ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT, FREE
from .arena import Arena
from .epochs import Reclaimer
from .table import ResidencyTable

_RESERVE_SHARE = 50
_RESERVE_LEAST = 8
_RESERVE_MOST_SHARE = 8


class Occupancy:
    """Keeps arena and table of a pool as its cache wants them.

    An expert is *shown* from when its record is complete until it is hidden. Its slot is *exposed* from when it is
    shown until nobody can be reading it any more; the cache gives away no slot that is exposed.

    While more slots are occupied than the limit allows, nothing is shown: what is there beyond the limit can leave as
    soon as nobody has pinned it, whoever else is reading.
    """

    def __init__(self, cache: ExpertCache, arena: Arena, table: ResidencyTable):
        self._cache = cache
        self._arena = arena
        self._table = table
        self._reclaimer = Reclaimer(table)
        self.shown_in = np.full(table.experts, ABSENT, dtype=np.int32)
        """What the table's ``slot_of`` should be."""
        self._being_read = np.zeros(arena.slots, dtype=np.int32)
        """How often each slot has been hidden while somebody may have been reading it who may still do so."""
        self.withheld: set[int] = set()
        """Experts that are not shown, since they are going to be moved."""
        self._backed = np.zeros(arena.slots, dtype=bool)
        """Slots whose memory has been allocated beforehand."""
        self._soiled: set[int] = set()
        """Slots with pages and perhaps without an expert."""

    def show(self, experts: IntArray) -> None:
        """Their records are complete in the slots the cache gave them."""
        if self._cache.occupied > self._cache.limit:
            return
        if self.withheld:
            experts = experts[[expert not in self.withheld for expert in experts.tolist()]]
        slots = self._cache.slot_of[experts]
        self._cache.exposed[slots] = True
        self._reclaimer.publish(experts, slots)
        self.shown_in[experts] = slots

    def show_again(self, experts: IntArray, loading: Container[int]) -> None:
        """Show those of ``experts`` that are resident, complete and hidden, as ``show``."""
        hidden = experts[self.shown_in[experts] == ABSENT].tolist()
        complete = [one for one in hidden if one not in loading and self._cache.slot_of[one] != ABSENT]
        if complete:
            self.show(np.array(complete))

    def freeze(self) -> None:
        """The daemon ends: what workers have seen stays where it is."""
        self._reclaimer.freeze()
        self._table.freeze()

    def show_rest(self, loading: Container[int]) -> None:
        """Show what was not shown while too much was occupied, and is neither incomplete nor retired, as ``show``."""
        hidden = np.flatnonzero((self._cache.slot_of != ABSENT) & (self.shown_in == ABSENT))
        if len(hidden):
            staying = [slot not in self._cache.retired for slot in self._cache.slot_of[hidden].tolist()]
            self.show_again(hidden[staying], loading)

    def hide(self, experts: IntArray) -> None:
        """Nobody shall begin to read ``experts``, as far as they are shown."""
        shown = [expert for expert in experts.tolist() if self.shown_in[expert] != ABSENT]
        if shown:
            slots = self.shown_in[shown]
            self._reclaimer.retire(np.array(shown), slots)
            self.shown_in[shown] = ABSENT
            self._being_read[slots] += 1

    def withhold(self, experts: IntArray) -> None:
        """Hide ``experts`` and show them no more, so that in the end nobody reads their slots, which may be at once."""
        self.withheld.update(experts.tolist())
        self.hide(experts)
        self.reclaim()

    def reclaim(self) -> None:
        """Find out which of the slots hidden nobody can be reading any more."""
        slots = self._reclaimer.reclaim()
        if len(slots):
            np.subtract.at(self._being_read, slots, 1)
            self._cache.exposed[slots] = self._being_read[slots] > 0
            again = self.shown_in[self._cache.expert_of[slots]] == slots
            self._cache.exposed[slots] |= again & (self._cache.expert_of[slots] != FREE)

    def held_up(self, seconds: float) -> bool:
        """Whether a worker has for so long been reading what has been hidden. To be asked after ``reclaim``."""
        return self._reclaimer.waiting_seconds > seconds

    def holders(self) -> list[int]:
        """Workers that keep hidden slots exposed."""
        return self._reclaimer.holders()

    def back(self, slot: int) -> None:
        """Take memory for a slot that is about to be written, if it has none. Not under the lock.

        Raises:
            ConfigError: the system has not enough.
        """
        if not self._backed[slot]:
            self._arena.allocate(slot)
            self._backed[slot] = True

    def soil(self, slots: IntArray) -> None:
        """These slots have been, or may have been, written, and their experts forgotten."""
        self._soiled.update(slots.tolist())

    @property
    def reserve(self) -> int:
        """Slots that should be retired before they are needed; none where every expert has a place."""
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
        return self._cache.occupied + sum(self._cache.expert_of[slot] == FREE for slot in self._soiled)

    @property
    def settled(self) -> bool:
        """Nothing has to be emptied."""
        return not self._soiled and self._cache.occupied <= self._cache.limit

    def make_room(self) -> None:
        """Retire what the reserve lacks or the limit forbids, and empty what may be emptied."""
        cache = self._cache
        self.reclaim()
        surplus = max(0, cache.occupied - cache.limit)
        room = max(0, cache.limit - cache.occupied)
        leaving = self._leaving()
        lacking = surplus + max(0, self.reserve - room) - len(leaving)
        if lacking > 0 and (surplus or self.running_low):
            self.hide(cache.retire(lacking))
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
        self.soil(slots)

    def _punch(self) -> None:
        """Give the pages of empty slots back."""
        for slot in list(self._soiled):
            if self._cache.expert_of[slot] != FREE:
                self._soiled.remove(slot)
            else:
                self._arena.punch(slot)
                self._backed[slot] = False
                self._soiled.remove(slot)

    def check_integrity(self, loading: Container[int]) -> None:
        """Assert that what workers see is what the cache means. For tests."""
        self._cache.check_integrity()
        shown = np.flatnonzero(self.shown_in != ABSENT)
        assert (self._table.slot_of == self.shown_in).all()
        assert (self._cache.slot_of[shown] == self.shown_in[shown]).all()
        assert not any(slot in self._cache.retired for slot in self.shown_in[shown].tolist()), "a retired slot is shown"
        assert not any(expert in loading for expert in shown.tolist()), "an incomplete record is shown"
        exposed = self._being_read > 0
        exposed[self.shown_in[shown]] = True
        assert (self._cache.exposed == exposed).all()
