"""What one worker keeps pinned in one pool, and what it says it used there.

Its caller holds the pool's lock. What the worker wrote must never be trusted further than its own experts go.
"""

import math
import time
from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..cache import EvictionPolicy, ExpertCache
from ..cache.base import IntArray
from ..ipc.table import ResidencyTable
from ..ipc.uses import STEP, UseReader


class WorkerPins:
    """Made when the worker is attached, with its entry of the pool's table cleared; ``release_all`` ends it.

    A pin is taken by ``keep`` for a ticket and freed by ``release_done`` when the worker has written the ticket's
    number, or taken with ``lease`` and freed by ``end_lease``. ``release_all`` frees whatever is left.
    """

    def __init__(self, table: ResidencyTable, worker: int):
        table.admit(worker)
        self.worker = worker
        self.last_ticket = 0
        self.lease: NDArray[np.int32] | None = None
        """Slots pinned for as long as it is attached."""
        self._table = table
        self._uses = UseReader(table, worker)
        self._tickets: deque[tuple[int, NDArray[np.int32], float]] = deque()
        """Numbers (rising), slots, and since when they are held."""

    def keep(self, ticket: int, slots: NDArray[np.int32]) -> None:
        """``slots`` stay pinned until the worker is done with ``ticket``."""
        assert not self._tickets or self._tickets[-1][0] < ticket, "tickets do not rise"
        self._tickets.append((ticket, slots, time.monotonic()))

    @property
    def holding_since(self) -> float:
        """Since when, on the monotonic clock, the oldest ticket of it is not done; never if there is none."""
        return self._tickets[0][2] if self._tickets else math.inf

    def release_done(self, cache: ExpertCache) -> bool:
        """Unpin what its finished tickets held. Returns whether there was any."""
        if not self._tickets:
            return False
        done = int(self._table.done[self.worker])
        released = []
        while self._tickets and self._tickets[0][0] <= done:
            released.append(self._tickets.popleft()[1])
        if released:
            cache.release_together(np.concatenate(released))
        return bool(released)

    def release_all(self, cache: ExpertCache) -> None:
        """It is gone: so are its pins and its entry."""
        while self._tickets:
            cache.release(self._tickets.popleft()[1])
        self.end_lease(cache)
        self._table.clear(self.worker)

    def end_lease(self, cache: ExpertCache) -> None:
        """Unpin what was leased. Idempotent."""
        if self.lease is not None:
            cache.release(self.lease)
            self.lease = None

    def report_uses(self, policy: EvictionPolicy) -> IntArray:
        """Tell the policy what the worker used since the last call; returns those experts."""
        noted = self._uses.drain()
        if len(noted) == 0:
            return noted
        step: dict[int, None] = {}
        for one in noted.tolist():
            if one != STEP:
                step[one] = None
            else:
                _use(policy, step)
                policy.begin_step()
                step = {}
        _use(policy, step)
        return noted[noted != STEP]


def _use(policy: EvictionPolicy, experts: dict[int, None]) -> None:
    if experts:
        policy.use(np.array(list(experts)))
