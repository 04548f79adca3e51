"""Residency: slots and experts that mirror each other, pins, and the choice of victims."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .base import EvictionPolicy, FloatArray, IntArray

ABSENT = -1
FREE = -1


class Acquisition(NamedTuple):
    """What an acquire or admit decided. ``missing[i]`` must be loaded into ``missing_slots[i]``."""

    slots: NDArray[np.int32]
    """Slot of each expert asked for, in the order asked."""
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
    """

    def __init__(self, layer_of: IntArray, num_slots: int, policy: EvictionPolicy):
        self.layer_of = np.asarray(layer_of)
        self.num_slots = num_slots
        self.policy = policy
        self.slot_of = np.full(len(layer_of), ABSENT, dtype=np.int32)
        self.expert_of = np.full(num_slots, FREE, dtype=np.int32)
        self.pins = np.zeros(num_slots, dtype=np.int32)
        self.transient = np.zeros(num_slots, dtype=bool)

    def begin_step(self) -> None:
        """A forward pass starts."""
        self.policy.begin_step()

    def acquire(self, experts: IntArray) -> Acquisition:
        """Pin ``experts`` (distinct flat ids), giving slots to those that have none.

        The resident ones are pinned before any victim is chosen, so no expert of this call can evict another. Every
        slot returned carries one more pin, to be given back with ``release``.

        Raises:
            ValueError: more experts are missing than there are unpinned slots; nothing has changed then.
        """
        slots = self.slot_of[experts]
        absent = slots == ABSENT
        if not absent.any():
            self.pins[slots] += 1
            self.transient[slots] = False
            self.policy.use(experts)
            return Acquisition(slots, _NONE, _NO_SLOTS, _NONE)

        resident = slots[~absent]
        self.pins[resident] += 1
        missing = np.asarray(experts, dtype=np.int64)[absent]
        taken = self._cheapest_slots(len(missing))
        if len(taken) < len(missing):
            self.pins[resident] -= 1
            raise ValueError(f"{len(missing)} experts are missing but only {len(taken)} slots are unpinned")
        evicted = self._place(missing, taken)
        self.pins[taken] += 1
        slots[absent] = taken
        self.transient[slots] = False
        self.policy.use(experts)
        return Acquisition(slots, missing, taken, evicted)

    def stream(self, experts: IntArray, share: int) -> Acquisition:
        """Pin ``experts`` (distinct) for a pass that will not come back to them soon, such as a long prefill.

        Resident ones are used where they are. The missing ones become transient and never occupy more than ``share``
        slots, so the rest of the pool keeps what decoding needs; they leave no mark in the policy. When fewer can be
        placed than are missing, the tail is left out (``slots`` is ABSENT there).
        """
        slots = self.slot_of[experts]
        absent = np.flatnonzero(slots == ABSENT)
        resident = slots[slots != ABSENT]
        self.pins[resident] += 1
        room = max(0, share - int(np.count_nonzero(self.transient)))
        taken = np.flatnonzero(self.transient & (self.pins == 0))[: len(absent)].astype(np.int32)
        if len(taken) < len(absent) and room:
            self.pins[taken] += 1
            further = self._cheapest_slots(min(len(absent) - len(taken), room))
            self.pins[taken] -= 1
            taken = np.concatenate([taken, further])
        placed = absent[: len(taken)]
        missing = np.asarray(experts, dtype=np.int64)[placed]
        evicted = self._place(missing, taken)
        self.transient[taken] = True
        self.pins[taken] += 1
        slots[placed] = taken
        return Acquisition(slots, missing, taken, evicted)

    def release(self, slots: IntArray) -> None:
        """Take one pin off each of ``slots`` (distinct)."""
        assert (self.pins[slots] > 0).all(), "released a slot that was not pinned"
        self.pins[slots] -= 1

    def admit(
        self,
        experts: IntArray,
        bias: FloatArray | None = None,
        protect: IntArray | None = None,
    ) -> Acquisition:
        """Give slots to ``experts`` (distinct) on a guess, pinning them while they are loaded.

        Best guesses come first: when slots run out the tail is left out (``slots`` is ABSENT there). Pinned slots,
        those of other ``experts`` and of ``protect`` are never taken. Experts already resident are neither pinned nor
        touched.

        Args:
            bias: added to the keep score of every expert, float64 ``[N]``; what is about to be used can be guarded so.
            protect: flat ids that must stay.
        """
        slots = self.slot_of[experts]
        absent = np.flatnonzero(slots == ABSENT)
        guarded = slots if protect is None else np.concatenate([slots, self.slot_of[protect]])
        guarded = np.unique(guarded[guarded != ABSENT])
        self.pins[guarded] += 1
        taken = self._cheapest_slots(len(absent), bias)
        self.pins[guarded] -= 1

        placed = absent[: len(taken)]
        missing = np.asarray(experts, dtype=np.int64)[placed]
        evicted = self._place(missing, taken)
        self.pins[taken] += 1
        slots[placed] = taken
        return Acquisition(slots, missing, taken, evicted)

    def forget(self, experts: IntArray) -> None:
        """Empty the slots of ``experts`` (resident, distinct): what was to be loaded into them never arrived."""
        slots = self.slot_of[experts]
        self.slot_of[experts] = ABSENT
        self.expert_of[slots] = FREE
        self.transient[slots] = False

    def check_integrity(self) -> None:
        """Assert the invariants. Tests call it after every operation."""
        resident = np.flatnonzero(self.slot_of != ABSENT)
        occupied = np.flatnonzero(self.expert_of != FREE)
        assert len(resident) == len(occupied) <= self.num_slots
        assert (self.expert_of[self.slot_of[resident]] == resident).all()
        assert (self.pins >= 0).all()
        assert (self.pins[self.expert_of == FREE] == 0).all(), "a free slot is pinned"
        assert not self.transient[self.expert_of == FREE].any(), "a free slot is transient"

    def _cheapest_slots(self, count: int, bias: FloatArray | None = None) -> NDArray[np.int32]:
        """Up to ``count`` unpinned slots, free ones first, then the least worth keeping."""
        free = np.flatnonzero(self.expert_of == FREE)[:count]
        wanted = count - len(free)
        if wanted == 0:
            return free.astype(np.int32)
        candidates = np.flatnonzero((self.expert_of != FREE) & (self.pins == 0))
        if len(candidates) > wanted:
            residents = self.expert_of[candidates]
            scores = self.policy.keep_scores(residents)
            if bias is not None:
                scores = scores + bias[residents]
            scores = np.where(self.transient[candidates], -np.inf, scores)
            candidates = candidates[np.argpartition(scores, wanted - 1)[:wanted]]
        return np.concatenate([free, candidates]).astype(np.int32)

    def _place(self, experts: NDArray[np.int64], slots: NDArray[np.int32]) -> NDArray[np.int64]:
        evicted = self.expert_of[slots]
        evicted = evicted[evicted != FREE].astype(np.int64)
        self.transient[slots] = False
        self.slot_of[evicted] = ABSENT
        self.slot_of[experts] = slots
        self.expert_of[slots] = experts
        self.policy.load(experts)
        return evicted


_NONE = np.empty(0, dtype=np.int64)
_NO_SLOTS = np.empty(0, dtype=np.int32)
