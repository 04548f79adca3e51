"""A record on its way into a slot of a hosted pool, and what became of a demand. It must never decide anything."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import LoadError
from ..pool.loader import Load
from ..pool.memory import SlotMemory


class Supply(NamedTuple):
    """What became of a demand."""

    slots: NDArray[np.int32]
    """Of each expert in the order asked; ABSENT where loading failed."""
    loaded: int
    joined: int
    failed: list[tuple[int, LoadError]]
    """Flat ids, and why."""


class HostedLoad(Load):
    """A record on its way into a slot that several may be waiting for. The pool hears of its end before they do.

    Args:
        flat: the expert's id in the pool.
        guess_of: the worker on whose guess it was started, if it was.
        pinned: whether its slot has a pin for the load itself, since nobody has asked for it yet.
        arrived: told of the end.
    """

    __slots__ = ("_arrived", "copied", "flat", "guess_of", "pinned")

    def __init__(
        self,
        layer: int,
        expert: int,
        memory: SlotMemory,
        slot: int,
        flat: int,
        guess_of: int | None,
        pinned: bool,
        arrived: Callable[["HostedLoad"], None],
    ):
        super().__init__(layer, expert, memory, slot)
        self.flat = flat
        self.guess_of = guess_of
        self.pinned = pinned
        self.copied = False
        """Whether it came from memory instead of the store."""
        self._arrived = arrived

    def finish(self) -> None:
        try:
            self._arrived(self)
        finally:
            super().finish()
