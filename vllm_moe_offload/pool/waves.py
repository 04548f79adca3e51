"""How a step that needs many experts is cut up. Pure arithmetic on routing decisions."""

from typing import NamedTuple

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


class Arrivals(NamedTuple):
    """In which order to load what a step lacks, and which rows can be computed when."""

    experts: NDArray[np.int64]
    """Every expert the step needs, within the layer: resident ones first, then the others in the order of loading."""
    groups: list[tuple[NDArray[np.int64], int]]
    """Rows (ascending), and how many of ``experts`` have to be there before they are computed."""


def order_arrivals(chosen: NDArray[np.integer], absent: NDArray[np.bool_]) -> Arrivals:
    """Cut the rows of a step so that some are computed while the experts of others are being loaded.

    The first group needs nothing that is absent, the second at most half of the absent experts, the last the rest.
    Groups without rows are left out. Rows are never split, so each is computed by one kernel call.

    Args:
        chosen: ``[rows, top_k]`` expert numbers within the layer; negative ones count for nothing.
        absent: ``[experts]``.
    """
    by_row = [[expert for expert in row if expert >= 0] for row in chosen.tolist()]
    is_absent = absent.tolist()
    lacking = [[expert for expert in row if is_absent[expert]] for row in by_row]
    resident = {expert for row in by_row for expert in row if not is_absent[expert]}
    half = -(-len({expert for row in lacking for expert in row}) // 2)
    loads: dict[int, None] = {}
    groups: list[tuple[list[int], int]] = [([], 0), ([], 0), ([], 0)]
    stage = 0
    for row in sorted(range(len(by_row)), key=lambda row: len(lacking[row])):
        after = len(loads) + sum(expert not in loads for expert in lacking[row])
        stage = max(stage, 0 if after == 0 else 1 if after <= half else 2)
        loads.update(dict.fromkeys(lacking[row]))
        groups[stage][0].append(row)
        groups[stage] = (groups[stage][0], len(resident) + len(loads))
    return Arrivals(
        np.array([*sorted(resident), *loads], dtype=np.int64),
        [(np.array(sorted(rows), dtype=np.int64), count) for rows, count in groups if rows],
    )


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
