"""Where in device memory the slots of each layer lie, and which rows its kernel is shown. Pure arithmetic.

A kernel must be given as many rows as its layer has experts: fewer change the configuration that it chooses, and with
it the result; ids that are not below that number make it write out of bounds. So every layer has a *window* of slots
and is shown a *view* of E rows that contains it; ids say where in the view a slot is. Rows of a view that are no slots
of the layer are never addressed. A *stage* is E rows at the end of the memory that hold all experts of one layer while
a step too wide for windows passes through. It takes no memory of its own: windows there are lent to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, lcm

ALIGNMENT = 256
"""Bytes. Every view starts on a multiple of it, as tensors that torch allocates do."""

_SMALL_BYTES = 4 << 10
_LARGE_BYTES = 64 << 10
_WORD_BYTES = 16


def is_shared(nbytes: int) -> bool:
    """Whether windows of all layers lie in one tensor of rows of ``nbytes`` each.

    Other components have E rows for each layer, which costs little as they are small: scales of whole experts, biases.
    Sizes that are no multiple of ``ALIGNMENT`` cost rows between windows, which only large components are worth.
    """
    if nbytes < _LARGE_BYTES:
        return nbytes >= _SMALL_BYTES and nbytes % ALIGNMENT == 0
    return nbytes % _WORD_BYTES == 0


def rounded(nbytes: int) -> int:
    """Up to the next multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class WindowPlan:
    """Windows, views and stages of the layers of one record layout; all positions are rows of the shared components.

    Layers are numbered as members of their layout (``store.pools.PoolMembers``).
    """

    experts: tuple[int, ...]
    """By member: experts of the layer, and rows that its kernel is shown."""
    slots: tuple[int, ...]
    """By member: slots of its window, from 1 up to its experts."""
    rows: int
    """Rows of each shared component."""
    starts: tuple[int, ...]
    """By member: the first row of its window."""
    begins: tuple[int, ...]
    """By member: the first row of the view that has its window."""
    stages: tuple[int, ...]
    """The first rows of one or two stages of ``stage_rows`` each; two if that needs no further rows."""

    @classmethod
    def of(cls, experts: Sequence[int], slots: Sequence[int], row_bytes: Sequence[int]) -> "WindowPlan":
        """The plan for layers of so many ``experts`` with windows of so many ``slots``.

        Args:
            row_bytes: of each component of a record.
        """
        assert experts and len(experts) == len(slots)
        assert all(1 <= few <= many for few, many in zip(slots, experts, strict=True)), (slots, experts)
        unit = lcm(*(ALIGNMENT // gcd(ALIGNMENT, nbytes) for nbytes in row_bytes if is_shared(nbytes)))
        starts, end = [], 0
        for count in slots:
            starts.append(-(-end // unit) * unit)
            end = starts[-1] + count
        stage_rows = max(experts)
        rows = max(end, stage_rows) + unit - 1

        def aligned_before(row: int) -> int:
            return row // unit * unit

        begins = [aligned_before(min(start, rows - shown)) for start, shown in zip(starts, experts, strict=True)]
        last = aligned_before(rows - stage_rows)
        stages = [stage for stage in (last, aligned_before(last - stage_rows)) if stage >= 0]
        return cls(tuple(experts), tuple(slots), rows, tuple(starts), tuple(begins), tuple(stages))

    @property
    def stage_rows(self) -> int:
        """Rows of one stage: as many as the largest layer has experts."""
        return max(self.experts)

    def base(self, member: int) -> int:
        """The id by which the kernel of ``member`` knows its slot 0; that of slot ``s`` is ``base + s``."""
        return self.starts[member] - self.begins[member]

    @cached_property
    def lent(self) -> frozenset[int]:
        """Members whose windows lie in a stage: they hold nothing any more once a stage has been written."""
        return frozenset(
            member
            for member, (start, count) in enumerate(zip(self.starts, self.slots, strict=True))
            if any(start < stage + self.stage_rows and stage < start + count for stage in self.stages)
        )

    def nbytes(self, row_bytes: Sequence[int]) -> int:
        """Device memory of all components: shared rows, and rows of the others for every member and stage."""
        blocks = (*self.experts, *(self.stage_rows for _ in self.stages))
        return sum(
            rounded(self.rows * nbytes) if is_shared(nbytes) else sum(rounded(rows * nbytes) for rows in blocks)
            for nbytes in row_bytes
        )
