"""How a step that needs many experts is cut up. Pure arithmetic on routing decisions."""

import numpy as np
from numpy.typing import NDArray

_TAKEN = 1 << 14
"""Stands for the number of experts a row adds that is in another group already: more than any room."""


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
    assert experts < _TAKEN // 2
    capacity = min(capacity, experts)
    uses = np.zeros((len(chosen), experts + 1), dtype=np.int16)
    uses[np.arange(len(chosen))[:, None], np.where(chosen < 0, experts, chosen)] = 1
    uses = uses[:, :experts]
    users = np.ascontiguousarray(uses.T)
    added = uses.sum(axis=1, dtype=np.int16)
    assert added.max(initial=0) <= capacity, "a single row needs more experts than there are slots"
    groups = []
    while (added < _TAKEN).any():
        rows = _take_group(added.copy(), uses, users, capacity)
        added[rows] = _TAKEN
        groups.append(rows)
    return groups


def _take_group(
    added: NDArray[np.int16], uses: NDArray[np.int16], users: NDArray[np.int16], capacity: int
) -> NDArray[np.int64]:
    """The rows of the next group, ascending.

    Args:
        added: ``[rows]`` experts each row would add to the group, above ``experts`` where it is in another group. It is
            changed in place: an expert that joins the group counts for less in the rows that use it.
        uses: ``[rows, experts]``: 1 where a row uses an expert; ``users`` is the same by expert.
        capacity: distinct experts of the group.
    """
    joined = np.zeros(len(added), dtype=bool)
    absent = np.ones(len(users), dtype=bool)
    row = int((added < _TAKEN).argmax())
    while added[row] <= capacity:
        new = np.flatnonzero(uses[row] & absent)
        absent[new] = False
        capacity -= len(new)
        added -= np.add.reduce(users[new], axis=0, dtype=np.int16)
        fits = added == 0
        joined |= fits
        added[fits] = _TAKEN
        row = int(added.argmin())
    return np.flatnonzero(joined)
