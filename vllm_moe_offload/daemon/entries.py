"""Which entries of a model's tables are free, and which of them nobody can be writing any more."""

from ..ipc.death import Death
from ..ipc.protocol import MAX_WORKERS


class Entries:
    """Given to workers in turn. Not thread-safe.

    A worker that was detached while it lived, at the moment it was writing its entry, writes it once more when it goes
    on. Its entry is given to others when its process has died, or when there is no other. Of a process that cannot be
    seen, in a container with pids of its own, only the turn keeps others away.
    """

    def __init__(self) -> None:
        self._last = -1
        self._taken: set[int] = set()
        self._pids: dict[int, int] = {}
        """Of the process that has, or had last, each entry."""
        self._deaths: dict[int, Death] = {}
        """By pid."""

    def take(self, pid: int) -> int | None:
        """An entry for a worker of process ``pid``, which lives; None if all are taken."""
        turn = [(self._last + 1 + number) % MAX_WORKERS for number in range(MAX_WORKERS)]
        free = [entry for entry in turn if entry not in self._taken]
        if not free:
            return None
        entry = self._last = next(filter(self._is_left, free), free[0])
        self._pids[entry] = pid
        self._taken.add(entry)
        self._watch(pid)
        return entry

    def give_back(self, entry: int) -> None:
        """Its worker has been detached."""
        self._taken.remove(entry)

    def close(self) -> None:
        """Nothing will be taken any more."""
        for death in self._deaths.values():
            death.close()

    def _is_left(self, entry: int) -> bool:
        return entry not in self._pids or self._deaths[self._pids[entry]].known()

    def _watch(self, pid: int) -> None:
        if pid in self._deaths and self._deaths[pid].known():  # another process had this pid
            self._deaths.pop(pid).close()
        if pid not in self._deaths:
            self._deaths[pid] = Death(pid)
        for other in self._deaths.keys() - set(self._pids.values()):
            self._deaths.pop(other).close()
