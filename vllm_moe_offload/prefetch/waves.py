"""How a step that needs many experts is cut up. Pure arithmetic on routing decisions."""

import numpy as np
from numpy.typing import NDArray


def streams(choices: int, experts: int, slots: int) -> bool:
    """Whether a layer of a step is better streamed through a share of the slots than cached.

    It is when the step makes at least four choices per expert of the layer, as a long prefill does: it needs nearly
    every expert of every layer once, and would otherwise wipe out what decoding keeps. A pool too small to hold a
    layer beside other things has nothing to protect.

    Args:
        choices: rows times top_k of the step.
        experts: experts of the layer.
        slots: slots of its pool.
    """
    return choices >= 4 * experts and slots >= experts


def group_rows(chosen: NDArray[np.integer], experts: int, capacity: int) -> list[NDArray[np.int64]]:
    """Partition the rows of a batch so that each group needs at most ``capacity`` distinct experts.

    Greedy: a group starts with the first row left, takes every row that adds nothing, then the row that adds least,
    until no row fits. Rows are never split, so each is computed by one kernel call exactly as in an ungrouped batch.

    Args:
        chosen: ``[rows, top_k]`` expert numbers within the layer; negative ones count for nothing.
        experts: experts of the layer.
        capacity: at least the largest number of distinct experts of any one row.
    """
    uses = np.zeros((len(chosen), experts + 1), dtype=bool)
    uses[np.arange(len(chosen))[:, None], np.where(chosen < 0, experts, chosen)] = True
    uses = uses[:, :experts]
    assert uses.sum(axis=1).max(initial=0) <= capacity, "a single row needs more experts than there are slots"
    left = np.arange(len(chosen))
    groups = []
    while len(left):
        union = uses[left[0]].copy()
        taken = np.zeros(len(left), dtype=bool)
        while True:
            added = (uses[left] & ~union).sum(axis=1)
            taken |= added == 0
            added[taken] = experts + 1
            best = int(added.argmin())
            if taken.all() or int(union.sum()) + added[best] > capacity:
                break
            union |= uses[left[best]]
        groups.append(left[taken])
        left = left[~taken]
    return groups
