"""A pool that outlives the daemon: it asks the one behind it, and another when the daemon is gone.

It alone maps other memory over the pool's slots, and must never do so while a read may still be copying into them.
"""

from collections.abc import Callable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from ..cache.base import IntArray
from ..errors import OffloadError
from ..ipc.arena import Arena
from ..load_report import NOTHING, LoadReport
from ..pool.base import Hold, SlotPool, Span
from .connection import DaemonGoneError, RefusedError

_GONE = (DaemonGoneError, RefusedError)
"""A daemon that refuses to go on is of no more use than none."""


class SurvivingPool(SlotPool):
    """Hands everything on to ``behind``, which is exchanged while nothing is held.

    Args:
        memory: the arena; its addresses stay when what is behind changes.
        fail_over: called when the daemon is gone; afterwards ``behind`` works without it.
    """

    def __init__(self, memory: Arena, behind: SlotPool, fail_over: Callable[[OffloadError], None]):
        self.memory: Arena = memory
        self.experts = behind.experts
        self.behind = behind
        self._fail_over = fail_over
        self._predictions_enabled = False

    def share(self, fd: int, behind: SlotPool) -> None:
        """Show the memory of a daemon, from which ``behind`` serves. Takes ``fd`` over. Nothing may be held.

        Raises:
            OffloadError: the memory cannot be mapped; nothing can be served before ``keep``.
        """
        self.behind.close()
        self.memory.mapping.replace(fd)
        self._exchange(behind)

    def keep(self, behind: SlotPool) -> None:
        """The memory shown becomes this process's own, and ``behind`` serves from it. Nothing may be held."""
        self.behind.close()
        self.memory.mapping.become_private()
        self._exchange(behind)

    def _exchange(self, behind: SlotPool) -> None:
        self.behind = behind
        if self._predictions_enabled:
            behind.enable_predictions()

    @property
    def capacity(self) -> int:
        return self.behind.capacity

    def begin_step(self) -> LoadReport:
        return self.behind.begin_step()

    def load_all(self) -> LoadReport:
        return self.behind.load_all()

    def hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        try:
            return self.behind.hold(layer, experts)
        except _GONE as error:
            self._fail_over(error)
            return self.behind.hold(layer, experts)

    def hold_streaming(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        try:
            return self.behind.hold_streaming(layer, experts)
        except _GONE as error:
            self._fail_over(error)
            return self.behind.hold_streaming(layer, experts)

    def stream_ahead(self, layer: Span) -> LoadReport:
        with suppress(DaemonGoneError):  # whoever waits for the experts finds out as well
            return self.behind.stream_ahead(layer)
        return NOTHING

    def settle(self, layer: Span) -> LoadReport:
        return self.behind.settle(layer)

    def start_hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        try:
            return self.behind.start_hold(layer, experts)
        except DaemonGoneError:  # so does finish_hold
            return Hold(experts, np.empty(0, np.int32)), NOTHING

    def finish_hold(self, layer: Span, hold: Hold) -> tuple[Hold, LoadReport]:
        try:
            return self.behind.finish_hold(layer, hold)
        except _GONE as error:
            self._fail_over(error)
            return self.behind.hold(layer, hold.experts)

    def abandon(self, hold: Hold) -> LoadReport:
        return self.behind.abandon(hold)

    def release(self, hold: Hold) -> None:
        self.behind.release(hold)

    def absent(self, layer: Span) -> NDArray[np.bool_]:
        return self.behind.absent(layer)

    def enable_predictions(self) -> None:
        self._predictions_enabled = True
        self.behind.enable_predictions()

    def expect(self, layer: Span, probabilities: NDArray[np.float32] | float) -> None:
        self.behind.expect(layer, probabilities)

    def prefetch(self, layer: Span, experts: IntArray) -> LoadReport:
        with suppress(DaemonGoneError):  # a guess that did not get through
            return self.behind.prefetch(layer, experts)
        return NOTHING

    def queued(self) -> int:
        return self.behind.queued()

    def close(self) -> None:
        self.behind.close()
