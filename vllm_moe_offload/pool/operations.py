"""Whether the operations on pools that share a loader have run to their ends, and what follows if one has not.

Nothing is undone step by step: an exception, Ctrl-C above all, may come between any two of them. Pools in which an
operation was left in the middle are emptied as a whole before the next one begins.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, TypeVar


class Ended(Protocol):
    """What fills the slots of pools, as far as it comes to an end."""

    def close(self) -> None:
        """When it returns, nothing is written to a slot any more."""


Loader = TypeVar("Loader", bound=Ended)


class Emptied(Protocol):
    """A pool, as far as it starts over."""

    def empty(self) -> None:
        """Nothing is resident, under way or held any more. Whoever calls it has ended all reads."""


class Operations(Generic[Loader]):
    """Context of every operation that changes a pool. One thread operates, and operations do not nest.

    Args:
        make_loader: a loader for these pools.
    """

    def __init__(self, make_loader: Callable[[], Loader]):
        self._make_loader = make_loader
        self._unfinished = False
        self.loader = make_loader()
        self.pools: list[Emptied] = []
        self.held = 0
        """Holds that have not been released."""
        self.generation = 0
        """How many times the pools have been emptied: holds of an earlier generation hold nothing."""

    def __enter__(self) -> None:
        if self._unfinished:
            self._start_over()
        self._unfinished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._unfinished = kind is not None

    @property
    def interrupted(self) -> bool:
        """The last operation did not run to its end: the next one will start with empty pools."""
        return self._unfinished

    def nothing_is_held(self) -> None:
        """A forward pass begins: whatever is still held belongs to one that was left early."""
        self._unfinished |= self.held > 0

    def close(self) -> None:
        """End the reads."""
        self.loader.close()

    def _start_over(self) -> None:
        self.loader.close()
        for pool in self.pools:
            pool.empty()
        self.held = 0
        self.generation += 1
        self.loader = self._make_loader()
