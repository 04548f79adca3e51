"""Which expert is in which slot of one layer's window, and how often it was used lately: integers only.

The same decisions are made on the device by ``kernels.manage``; this is what they are compared with, and what a replay
uses. Least frequently used with a half-life: a use adds ``USE`` to an expert's heat, and every ``HALF_LIFE`` steps
heat halves. (Frequency with exponential decay as in LRFU, Lee et al., 2001, in integers so that a device and a host
come to the same result.)
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 16
"""Steps after which a use counts half: one epoch."""
USE = 1 << 16
"""What a use adds to heat."""
MOST_HEAT = 1 << 30
"""Heat is cut off here."""
ABSENT = -1
COUNTED, STARTED, STARTED_AGAIN = 1, 2, 3
"""``WindowTables.mark``: loaded speculatively and not used since; the second, not in ``outcomes`` yet; the third, when
an earlier such load was overwritten."""


class Served(NamedTuple):
    """What one step has decided for one layer."""

    slots: NDArray[np.int32]
    """In the shape of the ids: their slots, ``ABSENT`` for ids that are negative or of experts kept elsewhere."""
    misses: NDArray[np.int32]
    """``[M, 2]``: expert and the slot it has to be loaded into, by ascending expert."""


class Outcomes(NamedTuple):
    """Of speculative loads of one layer, since they were counted last."""

    started: int
    useful: int
    """Used where they were loaded to."""
    wasted: int
    """Overwritten before they were used."""


class TooManyExpertsError(ValueError):
    """A step uses more experts of a layer than its window has slots; nothing has changed."""


class WindowTables:
    """Slots and experts of one window.

    Invariants (``check_integrity``): ``slot_of`` and ``expert_of`` mirror each other; only owned experts have slots;
    heat is not negative.

    Args:
        experts: ids are smaller.
        slots: of the window, not more than ``experts``.
        owned: bool ``[experts]``, which of them are kept here; all by default.
    """

    def __init__(self, experts: int, slots: int, owned: NDArray[np.bool_] | None = None):
        assert 0 < slots <= experts
        self.owned = np.ones(experts, dtype=bool) if owned is None else owned
        self.slot_of = np.full(experts, ABSENT, dtype=np.int32)
        self.expert_of = np.full(slots, ABSENT, dtype=np.int32)
        self.heat = np.zeros(experts, dtype=np.int32)
        """As of the expert's ``epoch``."""
        self.epoch = np.zeros(experts, dtype=np.int32)
        """When the expert was used last."""
        self.mark = np.zeros(experts, dtype=np.int32)
        """0, or what became of the expert's latest speculative load."""

    def serve(self, ids: NDArray[np.integer], step: int, real_rows: int | None = None) -> Served:
        """Slots for ``ids`` of one step; what has none takes free slots, then those of the least heat.

        No expert that the step uses loses its slot. However often a step uses an expert, it counts once.

        Args:
            ids: ``[T, K]``, negative where there is none.
            step: does not decrease from call to call.
            real_rows: rows behind them are padding: they are given the slots of row 0. Without real rows, nothing is
                used and all get slot 0.

        Raises:
            TooManyExpertsError: the used experts do not fit into the window.
        """
        real = len(ids) if real_rows is None else real_rows
        epoch = np.int32(step // HALF_LIFE)
        used = np.unique(ids[:real])
        used = used[used >= 0]
        used = used[self.owned[used]]
        missing = used[self.slot_of[used] == ABSENT]
        taken = self._victims(used, len(missing), epoch)
        left = self.expert_of[taken]
        self.slot_of[left[left != ABSENT]] = ABSENT
        self.slot_of[missing] = taken
        self.expert_of[taken] = missing
        self.heat[used] = np.minimum(self.heat_at(used, epoch) + USE, MOST_HEAT)
        self.epoch[used] = epoch
        return Served(self._slots_of_rows(ids, real), np.stack([missing, taken], axis=1).astype(np.int32))

    def admit(self, expert: int, step: int) -> int:
        """Give an absent expert a slot before anything uses it: a free one, else that of the least heat.

        Nothing is added to its heat.
        """
        assert self.slot_of[expert] == ABSENT
        slot = int(self._victims(np.empty(0, np.int32), 1, np.int32(step // HALF_LIFE))[0])
        left = self.expert_of[slot]
        if left != ABSENT:
            self.slot_of[left] = ABSENT
        self.slot_of[expert], self.expert_of[slot] = slot, expert
        return slot

    def speculate(self, scores: NDArray[np.float32], step: int, threshold: float) -> NDArray[np.int32]:
        """Give a slot to the absent expert that most likely is used next, if it is likely: ``[0 or 1, 2]`` as misses.

        It counts as no use. Experts that are likely themselves keep their slots.

        Args:
            scores: ``[experts]``; above ``threshold`` an expert is likely.
        """
        likely = scores > threshold
        wanted = np.flatnonzero(likely & self.owned & (self.slot_of == ABSENT))
        kept = np.flatnonzero(likely & (self.slot_of != ABSENT))
        if not len(wanted) or len(kept) == len(self.expert_of):
            return np.empty((0, 2), dtype=np.int32)
        expert = wanted[np.argmax(scores[wanted])]
        slot = self._victims(kept, 1, np.int32(step // HALF_LIFE))[0]
        left = self.expert_of[slot]
        if left != ABSENT:
            self.slot_of[left] = ABSENT
        self.slot_of[expert], self.expert_of[slot] = slot, expert
        self.mark[expert] = STARTED_AGAIN if self.mark[expert] else STARTED
        return np.array([[expert, slot]], dtype=np.int32)

    def serve_and_count(
        self, ids: NDArray[np.integer], step: int, real_rows: int | None = None
    ) -> tuple[Served, Outcomes]:
        """``serve``, and what became of speculative loads."""
        was_here = self.slot_of != ABSENT
        served = self.serve(ids, step, real_rows)
        used = np.isin(np.arange(len(self.slot_of)), ids[: len(ids) if real_rows is None else real_rows])
        useful = (self.mark > 0) & was_here & used
        wasted = (self.mark > 0) & ~(was_here & (self.slot_of != ABSENT))
        started, again = self.mark >= STARTED, self.mark == STARTED_AGAIN
        self.mark = np.where(useful | wasted, 0, np.minimum(self.mark, COUNTED)).astype(np.int32)
        return served, Outcomes(int(started.sum()), int(useful.sum()), int(wasted.sum() + again.sum()))

    def heat_at(self, experts: NDArray[np.integer], epoch: np.int32) -> NDArray[np.int32]:
        """What is left of the heat of ``experts``."""
        return self.heat[experts] >> np.minimum(epoch - self.epoch[experts], 31)

    def forget(self) -> None:
        """The slots have been overwritten: all are free. Heat stays."""
        self.slot_of[:] = ABSENT
        self.expert_of[:] = ABSENT

    def check_integrity(self) -> None:
        occupied = np.flatnonzero(self.expert_of != ABSENT)
        present = np.flatnonzero(self.slot_of != ABSENT)
        assert (self.slot_of[self.expert_of[occupied]] == occupied).all()
        assert (self.expert_of[self.slot_of[present]] == present).all()
        assert len(occupied) == len(present) and self.owned[present].all()
        assert (self.heat >= 0).all()

    def _victims(self, used: NDArray[np.integer], count: int, epoch: np.int32) -> NDArray[np.integer]:
        """The ``count`` slots to give away: by heat, free ones first, and by number among equals."""
        spared = np.isin(self.expert_of, used)
        if count > np.count_nonzero(~spared):
            raise TooManyExpertsError(f"{len(used)} experts are used, the window has {len(self.expert_of)} slots")
        worth = np.zeros(len(self.expert_of), dtype=np.int64)
        occupied = self.expert_of != ABSENT
        worth[occupied] = self.heat_at(self.expert_of[occupied], epoch).astype(np.int64) + 1
        worth[spared] = np.iinfo(np.int64).max
        return np.argsort(worth, kind="stable")[:count]

    def _slots_of_rows(self, ids: NDArray[np.integer], real: int) -> NDArray[np.int32]:
        if not real:
            return np.zeros(ids.shape, dtype=np.int32)
        slots = np.where(ids >= 0, self.slot_of[np.maximum(ids, 0)], ABSENT).astype(np.int32)
        slots[real:] = slots[0]
        return slots
