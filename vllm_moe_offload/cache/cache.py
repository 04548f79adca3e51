"""Residency: slots and experts that mirror each other, pins, and the choice of victims."""

from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import EvictionPolicy, IntArray

ABSENT = -1
FREE = -1
_NONE = np.empty(0, dtype=np.int64)
_NO_SLOTS = np.empty(0, dtype=np.int32)


class Acquisition(NamedTuple):
    """What an acquire or admit decided. ``missing[i]`` must be loaded into ``missing_slots[i]``."""

    slots: NDArray[np.int32]
    """Slot of each expert asked for, in the order of the request."""
    missing: NDArray[np.int64]
    missing_slots: NDArray[np.int32]
    evicted: NDArray[np.int64]
    """Experts that lost their slots to the missing ones."""


class ExpertCache:
    """A bounded set of slots and the experts in them.

    Invariants (``check_integrity``): ``slot_of`` and ``expert_of`` mirror each other; a pinned slot is never given
    away; no more experts are resident than there are slots.

    A *transient* slot holds an expert that streamed through for a long prefill: nothing is lost when it leaves, so it
    is the first to go, until an ordinary ``acquire`` uses it.

    A *retired* slot (``retire``) still holds its expert, but is given away before any other that is occupied, in the
    order of retirement; it is kept if its expert is used again before.

    An *exposed* slot may be read without a pin; its owner keeps ``exposed`` up to date. It may be
    retired, but is never given away nor emptied, so whatever is loaded can be written into its slot at once.

    Args:
        layer_of: int ``[N]``, the layer of each expert.
        at_home: there are as many slots as experts, and an expert goes to the slot of its own number if that is free.
    """

    def __init__(self, layer_of: IntArray, num_slots: int, policy: EvictionPolicy, at_home: bool = False):
        assert not at_home or num_slots == len(layer_of)
        self.layer_of = np.asarray(layer_of)
        self.num_slots = num_slots
        self.policy = policy
        self.at_home = at_home
        self.limit = num_slots
        """How many slots may be occupied. When it is lowered below what is, nothing more is occupied until whoever
        lowered it has emptied the surplus: ``retire``, and ``forget`` once nobody reads what was retired."""
        self.slot_of = np.full(len(layer_of), ABSENT, dtype=np.int32)
        self.expert_of = np.full(num_slots, FREE, dtype=np.int32)
        self.pins = np.zeros(num_slots, dtype=np.int32)
        self.transient = np.zeros(num_slots, dtype=bool)
        self.found: IntArray = _NO_SLOTS
        """Slots that ``find`` returned last; they are not given away until ``find``, ``acquire`` or ``stream`` is next
        called."""
        self.exposed = np.zeros(num_slots, dtype=bool)
        self.retired: dict[int, None] = {}
        """Slots that were retired, in that order."""
        self.occupied = 0
        """How many slots are not free."""

    @property
    def available(self) -> int:
        """Slots that can be given away now."""
        leaving = (self.pins == 0) & (self.expert_of != FREE) & ~self.exposed
        return self._free_room + int(np.count_nonzero(leaving))

    def begin_step(self) -> None:
        """A forward pass starts."""
        self.policy.begin_step()

    def find(self, experts: IntArray) -> NDArray[np.int32] | None:
        """The slots of ``experts`` (distinct flat ids) if all are resident, else None. The running pass reads them.

        Cheaper than ``acquire`` and ``release``: nothing is pinned, see ``found``.
        """
        slots = self.slot_of[experts]
        if slots.min(initial=0) < 0:
            return None
        self.transient[slots] = False
        self._unretire(slots)
        self.policy.use(experts)
        self.found = slots
        return slots

    def acquire(self, experts: IntArray, use: bool = True, beyond_limit: bool = False) -> Acquisition:
        """Pin ``experts`` (distinct flat ids), giving slots to those that have none.

        The resident ones are pinned before any victim is chosen, so no expert of this call can evict another. Every
        slot returned carries one more pin, to be given back with ``release``.

        Args:
            use: count it as a use by the running pass; False where uses are counted elsewhere.
            beyond_limit: occupy free slots above the limit where nothing else is available.

        Raises:
            ValueError: more experts are missing than slots are available; nothing has changed then.
        """
        self.found = _NO_SLOTS
        slots = self.slot_of[experts]
        absent = slots == ABSENT
        if not absent.any():
            self.pins[slots] += 1
            self.transient[slots] = False
            self._unretire(slots)
            if use:
                self.policy.use(experts)
            return Acquisition(slots, _NONE, _NO_SLOTS, _NONE)
        resident = slots[~absent]
        self.pins[resident] += 1
        missing = experts[absent].astype(np.int64)
        taken = self._cheapest_slots(missing)
        if beyond_limit and len(taken) < len(missing):
            rest = missing[len(taken) :]
            taken = np.concatenate([taken, self._free_slots(rest, len(rest), taken)], dtype=np.int32, casting="unsafe")
        if len(taken) < len(missing):
            self.pins[resident] -= 1
            raise ValueError(f"{len(missing)} experts are missing but only {len(taken)} slots are free or unpinned")
        evicted = self._place(missing, taken)
        self.pins[taken] = 1
        slots[absent] = taken
        self.transient[resident] = False
        self._unretire(resident)
        if use:
            self.policy.use(experts)
        return Acquisition(slots, missing, taken, evicted)

    def stream(self, experts: IntArray, share: int) -> Acquisition | None:
        """Pin ``experts`` (distinct) for a pass that will not come back to them soon, such as a long prefill.

        Resident ones are used where they are. The missing ones become transient and leave no mark in the policy. They
        take free slots, then those of other transient experts, and only then others: no more of these than leave
        ``share`` slots transient, so what decoding uses is kept but for its share.

        Returns None where not all of them can be placed: nothing has changed then, and ``acquire`` may find slots.
        """
        return self._stream(experts, share, whole=True)

    def stream_ahead(self, experts: IntArray, share: int) -> Acquisition:
        """As ``stream``, of as many as can be placed: the tail is left out (``slots`` is ABSENT there)."""
        acquired = self._stream(experts, share, whole=False)
        assert acquired is not None
        return acquired

    def release(self, slots: IntArray) -> None:
        """Take one pin off each of ``slots`` (distinct)."""
        pins = self.pins[slots] - 1
        assert pins.min(initial=0) >= 0, "released a slot that was not pinned"
        self.pins[slots] = pins

    def release_together(self, slots: IntArray) -> None:
        """Take one pin off each of ``slots`` for every time that it is named."""
        np.subtract.at(self.pins, slots, 1)
        assert self.pins[slots].min(initial=0) >= 0, "released a slot that was not pinned"

    def admit(self, experts: IntArray, protect: IntArray | None = None) -> Acquisition:
        """Give slots to ``experts`` (distinct) that are loaded speculatively, pinning them while they are loaded.

        The most probable come first: when slots run out the tail is left out (``slots`` is ABSENT there). Pinned slots,
        those of other ``experts`` and of ``protect`` are never taken. Experts already resident are neither pinned nor
        touched.

        Args:
            protect: flat ids that must stay.
        """
        slots = self.slot_of[experts]
        absent = (slots == ABSENT).nonzero()[0]
        missing = np.asarray(experts, dtype=np.int64)[absent]
        guarded = slots if protect is None else np.union1d(slots, self.slot_of[protect])
        guarded = guarded[guarded != ABSENT]
        self.pins[guarded] += 1
        taken = self._cheapest_slots(missing)
        self.pins[guarded] -= 1
        placed = absent[: len(taken)]
        missing = missing[: len(taken)]
        evicted = self._place(missing, taken)
        self.pins[taken] += 1
        slots[placed] = taken
        return Acquisition(slots, missing, taken, evicted)

    def forget(self, experts: IntArray) -> None:
        """Empty the slots of ``experts`` (resident, distinct): what was to be loaded into them never arrived."""
        slots = self.slot_of[experts]
        assert slots.min(initial=0) >= 0, "an absent expert is forgotten"
        assert not self.pins[slots].any(), "a pinned slot is emptied"
        assert not self.exposed[slots].any(), "a slot is emptied that may be read"
        self.slot_of[experts] = ABSENT
        self.expert_of[slots] = FREE
        self.occupied -= len(slots)
        self.transient[slots] = False
        self._unretire(slots)

    def clear(self) -> None:
        """Empty all slots, whoever has pinned them: all pins are void. The policy remembers what it has seen."""
        self.slot_of[:] = ABSENT
        self.expert_of[:] = FREE
        self.pins[:] = 0
        self.transient[:] = False
        self.found = _NO_SLOTS
        self.retired.clear()
        self.occupied = 0

    def retire(self, count: int) -> NDArray[np.int64]:
        """Choose up to ``count`` more unpinned experts that shall leave next, and return them.

        They stay resident until their slots are given away or they are forgotten. Those used again stay for good.
        """
        return self._retire(self._least_worth(count))

    def retire_for(self, experts: IntArray, share: int | None = None) -> NDArray[np.int64]:
        """Retire as many others as have to leave for ``acquire``, or with a ``share`` for ``stream``, of ``experts``.

        Returns the newly retired ones. Those retired before and still exposed are counted on.
        """
        slots = self.slot_of[experts]
        resident = slots[slots != ABSENT]
        self.pins[resident] += 1
        unpinned = (self.pins == 0) & (self.expert_of != FREE)
        leaving = ~self.exposed
        leaving[list(self.retired)] = True
        leaving &= unpinned
        short = len(experts) - len(resident)
        free = min(short, self._free_room)
        short -= free
        if share is None:
            short -= int(np.count_nonzero(leaving))
        else:
            room = self._room_to_stream(share, free)
            others = int(np.count_nonzero(leaving & ~self.transient))
            staying = int(np.count_nonzero(self.transient & unpinned & ~leaving))
            short -= int(np.count_nonzero(leaving & self.transient)) + min(room, others)
            short = min(short, staying + max(0, room - others))
        newly = self._retire(self._least_worth(short, exposed=True))
        self.pins[resident] -= 1
        return newly

    def keep(self, experts: IntArray) -> None:
        """``experts`` (resident) shall not leave after all."""
        slots = self.slot_of[experts]
        assert slots.min(initial=0) >= 0, "an absent expert is kept"
        self._unretire(slots)

    def cancel(self, experts: IntArray) -> None:
        """As ``forget``, whoever has pinned them: their pins are void."""
        self.pins[self.slot_of[experts]] = 0
        self.forget(experts)

    def insert_resident(self, experts: IntArray, slots: IntArray) -> None:
        """``experts`` (distinct, absent) are found to be in ``slots`` (distinct, free) already."""
        assert (self.slot_of[experts] == ABSENT).all() and (self.expert_of[slots] == FREE).all()
        self.slot_of[experts] = slots
        self.expert_of[slots] = experts
        self.occupied += len(slots)
        assert (self.expert_of[slots] == experts).all(), "two experts are said to be in one slot"

    def move(self, expert: int, slot: int) -> None:
        """``expert`` (resident, unpinned) changes to a free slot."""
        assert self.expert_of[slot] == FREE and self.pins[self.slot_of[expert]] == 0
        old = self.slot_of[expert]
        transient = self.transient[old]
        self.forget(np.array([expert]))
        self.insert_resident(np.array([expert]), np.array([slot]))
        self.transient[slot] = transient

    def check_integrity(self) -> None:
        """Assert the invariants. Tests call it after every operation."""
        resident = np.flatnonzero(self.slot_of != ABSENT)
        occupied = np.flatnonzero(self.expert_of != FREE)
        assert len(resident) == len(occupied) == self.occupied <= self.num_slots
        assert (self.expert_of[self.slot_of[resident]] == resident).all()
        assert (self.pins >= 0).all()
        assert (self.pins[self.expert_of == FREE] == 0).all(), "a free slot is pinned"
        assert not self.transient[self.expert_of == FREE].any(), "a free slot is transient"
        assert not self.exposed[self.expert_of == FREE].any(), "a free slot is exposed"
        retired = list(self.retired)
        assert (self.expert_of[retired] != FREE).all() and not self.pins[retired].any(), "a retired slot is in use"

    def _cheapest_slots(self, experts: NDArray[np.int64]) -> NDArray[np.int32]:
        """Unpinned slots for up to all of ``experts`` (absent ones), in their order.

        Free ones first, then those retired, then the least worth keeping.
        """
        free = self._free_slots(experts, self._free_room)
        victims = self._victims(len(experts) - len(free))
        return np.concatenate([free, victims], dtype=np.int32, casting="unsafe")

    def _stream(self, experts: IntArray, share: int, whole: bool) -> Acquisition | None:
        self.found = _NO_SLOTS
        slots = self.slot_of[experts]
        absent = np.flatnonzero(slots == ABSENT)
        resident = slots[slots != ABSENT]
        missing = np.asarray(experts, dtype=np.int64)[absent]
        self.pins[resident] += 1
        taken = self._slots_to_stream(missing, share)
        if whole and len(taken) < len(missing):
            self.pins[resident] -= 1
            return None
        self._unretire(resident)
        missing = missing[: len(taken)]
        evicted = self._place(missing, taken)
        self.transient[taken] = True
        self.pins[taken] += 1
        slots[absent[: len(taken)]] = taken
        return Acquisition(slots, missing, taken, evicted)

    def _slots_to_stream(self, experts: NDArray[np.int64], share: int) -> NDArray[np.int32]:
        """Unpinned slots for up to all of ``experts`` (absent ones), in their order, as ``stream`` takes them."""
        free = self._free_slots(experts, self._free_room)
        wanted = len(experts) - len(free)
        passed = np.flatnonzero(self.transient & (self.pins == 0) & ~self.exposed)[:wanted]
        wanted = min(wanted - len(passed), self._room_to_stream(share, len(free)))
        self.pins[passed] += 1
        victims = self._victims(wanted)
        self.pins[passed] -= 1
        return np.concatenate([free, passed, victims], dtype=np.int32, casting="unsafe")

    def _room_to_stream(self, share: int, free: int) -> int:
        """How many slots that are not transient a stream may take beside ``free`` ones."""
        return max(0, share - int(np.count_nonzero(self.transient)) - free)

    def _victims(self, count: int) -> NDArray[np.integer]:
        """Up to ``count`` slots to give away: first those retired, then the least worth keeping."""
        if not self.retired:
            return self._least_worth(count, exposed=False)
        available = (slot for slot in self.retired if self.pins[slot] == 0 and not self.exposed[slot])
        retired = np.fromiter(islice(available, max(0, count)), dtype=np.int32)
        return np.concatenate([retired, self._least_worth(count - len(retired), exposed=False)])

    @property
    def _free_room(self) -> int:
        """How many free slots can be given away now."""
        return max(0, min(self.limit, self.num_slots) - self.occupied)

    def _free_slots(self, experts: NDArray[np.int64], room: int, but: IntArray = _NO_SLOTS) -> NDArray[np.integer]:
        """Up to ``room`` free slots, none of ``but``, for the first of ``experts``."""
        if room <= 0:
            return _NO_SLOTS
        free = self.expert_of == FREE
        free[but] = False
        if not self.at_home:
            return np.flatnonzero(free)[: min(room, len(experts))]
        taken = experts[:room].copy()
        elsewhere = ~free[taken]
        if elsewhere.any():
            free[taken] = False
            taken[elsewhere] = np.flatnonzero(free)[: np.count_nonzero(elsewhere)]
        return taken

    def _retire(self, slots: NDArray[np.integer]) -> NDArray[np.int64]:
        self.retired.update(dict.fromkeys(slots.tolist()))
        return self.expert_of[slots].astype(np.int64)

    def _least_worth(self, count: int, exposed: bool | None = None) -> NDArray[np.integer]:
        """Up to ``count`` slots that are neither free nor pinned nor retired, and ``exposed`` or not if given."""
        if count <= 0:
            return _NO_SLOTS
        candidate = self.pins == 0
        candidate &= self.expert_of != FREE
        candidate[self.found] = False
        if exposed is not None:
            candidate &= self.exposed == exposed
        if self.retired:
            candidate[list(self.retired)] = False
        candidates = candidate.nonzero()[0]
        if len(candidates) <= count:
            return candidates
        residents = self.expert_of[candidates]
        scores = self.policy.keep_scores(residents)
        assert scores.shape == residents.shape, "a policy must score every resident it is asked about"
        scores[self.transient[candidates]] = -np.inf
        return candidates[scores.argpartition(count - 1)[:count]]

    def _place(self, experts: NDArray[np.int64], slots: NDArray[np.int32]) -> NDArray[np.int64]:
        assert len(experts) == len(slots)
        assert not self.pins[slots].any() and not self.exposed[slots].any(), "a slot in use is given away"
        assert (self.slot_of[experts] == ABSENT).all(), "an expert gets a second slot"
        evicted = self.expert_of[slots]
        evicted = evicted[evicted != FREE].astype(np.int64)
        self.transient[slots] = False
        self._unretire(slots)
        self.occupied += len(experts) - len(evicted)
        self.slot_of[evicted] = ABSENT
        self.slot_of[experts] = slots
        self.expert_of[slots] = experts
        self.policy.load(experts)
        assert self.occupied <= self.num_slots
        return evicted

    def _unretire(self, slots: IntArray) -> None:
        if self.retired:
            for slot in slots.tolist():
                self.retired.pop(slot, None)
