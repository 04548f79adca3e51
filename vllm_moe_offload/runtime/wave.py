"""Parts of a step that one kernel call each computes."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Wave(NamedTuple):
    """A part of a step that one kernel call computes: its experts are loaded and held until the next wave."""

    rows: NDArray[np.int64] | None
    """Which rows of the batch, or None for all of them."""
    slots: NDArray[np.int32]
    """``[rows, top_k]``: the slot of every chosen expert; -1 where the choice is not this worker's."""
    view: int = 0
    """In which of the tensors that the layer's kernel can be shown; 0 unless its pool has several."""


class Waves(Protocol):
    """The waves of a layer. Closed before the last one has been asked for, it lets go of what is held."""

    def __iter__(self) -> Iterator[Wave]: ...
    def close(self) -> None: ...


class SingleWave:
    """Waves of a layer whose experts were all found: there is nothing to wait for and nothing to let go of."""

    __slots__ = ("_wave",)

    def __init__(self, wave: Wave):
        self._wave = wave

    def __iter__(self) -> Iterator[Wave]:
        return iter((self._wave,))

    def close(self) -> None:
        pass
