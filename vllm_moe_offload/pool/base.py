"""The contract of a pool of slots: what a forward pass may ask of it, wherever its experts are kept.

Experts are flat ids: the layers of one record layout in the order of the store, each taking as many ids as it has
experts. One thread asks, one forward pass at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cache.base import IntArray
from ..errors import LoadError, OffloadError
from ..load_report import NOTHING, LoadReport
from ..report.report import Residency
from ..store.layout import RecordLayout
from .memory import SlotMemory
from .waves import streams

Span = range
"""The flat ids of one layer."""


class Failure(NamedTuple):
    """An expert whose record could not be brought in."""

    expert: int
    error: LoadError


class PoolGoneError(OffloadError):
    """Whoever kept the slots of a pool is gone: the pool is of no use any more, and nothing is held."""


class Hold:
    """Experts that stay in their slots until the hold is released.

    ``slots`` (int32, in the order asked) may be read once the hold is finished, except those of ``failures``. Where
    kernels can be shown several tensors of slots, they are rows of the one numbered ``view``.
    """

    __slots__ = ("experts", "failures", "slots", "view")

    def __init__(self, experts: IntArray, slots: NDArray[np.int32]):
        self.experts = experts
        self.slots = slots
        self.view = 0
        self.failures: list[Failure] = []


class SlotPool(ABC):
    """Slots of one or several layers whose records have one layout, and who is in them.

    What a call counts, waits for or starts is in the report that it returns, and in no other.

    A pool that somebody else keeps may raise ``PoolGoneError`` where it waits for experts: in ``hold``,
    ``hold_streaming`` and ``finish_hold``. What nobody waits for it lets fail in silence: who needs it finds out.
    """

    @property
    @abstractmethod
    def layout(self) -> RecordLayout:
        """Of the records that fit into a slot."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Slots that may be occupied at a time."""

    def streams(self, choices: int, needed: int, experts: int) -> bool:
        """Whether a layer is to be held streaming, which needs so many of its ``experts`` for so many choices."""
        return streams(choices, experts, self.capacity)

    def begin_step(self) -> LoadReport:
        """A forward pass over scheduled tokens starts."""
        return NOTHING

    @abstractmethod
    def load_all(self) -> LoadReport:
        """Fill every slot: expert ``i`` goes to slot ``i`` for good. For pools that hold all experts.

        Raises:
            LoadError: a record could not be read.
        """

    def find(self, experts: IntArray) -> tuple[NDArray[np.int32], LoadReport] | None:
        """The slots of ``experts`` (distinct) if all of them can be read at once, else None; nothing is waited for.

        They can be read until the pool is next asked to find or to hold experts. A pool may always return None.
        """
        return None

    @abstractmethod
    def hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        """Wait until ``experts`` (distinct, of ``layer``, at most ``capacity``) are in slots, and keep them there."""

    @abstractmethod
    def hold_streaming(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        """As ``hold``, for a long prefill: it passes through a share of the slots and leaves the rest alone."""

    @abstractmethod
    def stream_ahead(self, layer: Span) -> LoadReport:
        """A long prefill is about to reach ``layer``: start on its experts."""

    @abstractmethod
    def settle(self, layer: Span) -> LoadReport:
        """``layer`` will be held part by part: wait for what is under way where it could be in the way."""

    @abstractmethod
    def start_hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        """Begin a hold without waiting for it. Two may be open at once if both fit into ``capacity``."""

    def seconds_to_load(self, count: int) -> float:
        """Seconds that a started hold will take to load ``count`` experts, as far as measured.

        0 where it does not load them in the order asked as fast as ``hold`` does: ``wait_for`` is not implemented then.
        """
        return 0.0

    def wait_for(self, hold: Hold, count: int) -> LoadReport:
        """Wait until the first ``count`` experts of a started hold are there: their ``slots`` may be read then.

        Only ``finish_hold`` tells which could not be loaded.
        """
        raise NotImplementedError

    @abstractmethod
    def finish_hold(self, layer: Span, hold: Hold) -> tuple[Hold, LoadReport]:
        """Wait until the experts of a started hold are there; returns the hold to read, which replaces the other."""

    @abstractmethod
    def abandon(self, hold: Hold) -> LoadReport:
        """A started hold will not be finished: the pass was left early."""

    @abstractmethod
    def release(self, hold: Hold) -> None:
        """The pass has read what it held."""

    @abstractmethod
    def absent(self, layer: Span) -> NDArray[np.bool_]:
        """``[len(layer)]``: which experts have no slot and are not being loaded."""

    def residency(self, layer: Span) -> NDArray[np.uint8]:
        """``[len(layer)]``, see ``report.Residency``; any thread may ask, and see a change that is under way or not."""
        return (~self.absent(layer)).astype(np.uint8)

    @abstractmethod
    def enable_predictions(self) -> None:
        """From now on ``expect`` will be called: let eviction take account of it. Idempotent."""

    @abstractmethod
    def expect(self, layer: Span, probabilities: NDArray[np.float32] | float) -> None:
        """With these probabilities ``[len(layer)]`` the running step will use the layer's experts."""

    @abstractmethod
    def prefetch(self, layer: Span, experts: IntArray) -> LoadReport:
        """Start loading experts of ``layer`` speculatively, best first, as many as slots can be spared for."""

    @abstractmethod
    def queued(self) -> int:
        """Loads under way that nobody waits for."""

    @abstractmethod
    def close(self) -> None:
        """Nothing will be asked any more."""


def residency_of(slot_of: NDArray[np.int32], pins: NDArray[np.integer]) -> NDArray[np.uint8]:
    """``SlotPool.residency`` of experts in these slots, negative where absent, of which each has so many ``pins``."""
    found = np.where(pins[slot_of] > 0, Residency.PINNED, Residency.RESIDENT)
    return np.where(slot_of < 0, Residency.ABSENT, found).astype(np.uint8)


class HostPool(SlotPool):
    """A pool whose slots are memory of the host."""

    memory: SlotMemory
    experts: int
    """How many there are in all; ids are smaller."""
    holds_overlap: bool
    """Whether it may be asked for experts while others are held. Where not, a released hold may still fail."""

    @abstractmethod
    def hold_resident(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        """Hold those of ``experts`` (distinct, of ``layer``) that are in slots already; nothing is waited for.

        It counts as no use. Speculative loads among them are withdrawn: whoever copies an expert on has its own.
        """

    @property
    def pages_stay(self) -> bool:
        """Whether a device may read slots of this pool by pages that its driver has looked up once."""
        return self.memory.pages_stay

    @property
    def layout(self) -> RecordLayout:
        return self.memory.layout


class PoolSource(Protocol):
    """Who keeps the pools of a runtime and can put others in their place: all of them, while nothing is held.

    The memory of the slots stays at its addresses, whatever becomes of its contents.
    """

    @property
    def pools(self) -> Mapping[str, SlotPool]:
        """By the layers' names in the store."""

    def begin_step(self) -> bool:
        """Nothing is held. Returns whether ``pools`` are others now."""

    def fail_over(self, reason: PoolGoneError) -> None:
        """The pools are gone, and nothing is held: put ``pools`` in their place that work."""
