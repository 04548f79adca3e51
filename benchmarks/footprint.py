"""How much memory a peer needs besides experts, and what a memory limit leaves for them. Pure arithmetic, in bytes."""

from typing import NamedTuple

MIB, GIB = 1 << 20, 1 << 30
MARGIN = 128 * MIB
"""For what a memory cgroup is charged and no process shows: page tables, the kernel's buffers, files being read."""


class Footprint(NamedTuple):
    """A peer's memory besides experts: anonymous and shared memory at its peak, mapped libraries, other weights."""

    besides_experts: int

    @classmethod
    def of(cls, peak: int, mapped: int, experts_held: int, mapped_weights: int) -> "Footprint":
        """From what was measured without a limit.

        `peak`: anonymous and shared memory, `experts_held` of it experts. `mapped`: of files other than the model's.
        `mapped_weights`: of the model's file what is no expert, if the peer maps it.
        """
        return cls(peak - experts_held + mapped + mapped_weights)

    def limit_for(self, experts: int) -> int:
        """The memory limit in which so many bytes of experts fit, in slots or in the page cache."""
        return self.besides_experts + experts + MARGIN

    def experts_within(self, limit: int) -> int:
        """How many bytes of experts fit into a memory limit; below zero: not even the rest does."""
        return limit - MARGIN - self.besides_experts


class Allowance(NamedTuple):
    """What a peer may use, in bytes: a memory limit (None: no limit), and how much of it is left for experts."""

    limit: int | None
    experts: int

    @classmethod
    def of(cls, footprint: Footprint, experts: int, memory_limit: int | None, share: float | None) -> "Allowance":
        """For equal memory or, if `share` is given, for an equal share of `experts` bytes. Raises ValueError."""
        if share is not None:
            return cls(footprint.limit_for(int(share * experts)), int(share * experts))
        assert memory_limit is not None
        left = footprint.experts_within(memory_limit)
        if left <= 0:
            need = memory_limit - left
            raise ValueError(f"needs {need / GIB:.2f} GiB besides experts, the limit is {memory_limit / GIB:.2f} GiB")
        return cls(memory_limit, min(left, experts))
