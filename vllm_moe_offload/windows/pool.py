"""A layer's window of slots in device memory, over a pool of host memory, managed by the host between two kernels.

It must never show a kernel a slot whose copy it was not told to wait for, nor have a slot written before the kernels
that read it are done.
"""

from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..cache import Acquisition, ExpertCache
from ..cache.base import IntArray
from ..cache.cache import ABSENT
from ..cache.outcomes import SpeculativeLoads
from ..cache.policies import PredictionAwarePolicy
from ..device.base import Event
from ..device.transfer import SpeculativeCopy
from ..load_report import NOTHING, LoadReport
from ..pool.base import Hold, SlotPool, Span, residency_of
from ..pool.operations import Operations
from ..pool.void import VoidExperts
from ..pool.waves import streams
from ..store.layout import RecordLayout
from .clock import KernelClock
from .host_tier import Carried, HostReads, HostTier, Parts, copies
from .memory import View, WindowMemory
from .stage import Stage, Stages


class _WindowHold(Hold):
    """Of a window (view 0) or a stage. ``window_slots`` are pinned in the window, whatever ids kernels are given."""

    __slots__ = ("generation", "window_slots")

    def __init__(self, experts: IntArray, slots: NDArray[np.int32], view: View, generation: int):
        super().__init__(experts, slots)
        self.view = view
        self.generation = generation
        self.window_slots: NDArray[np.int32] | None = None


class _Speculated(NamedTuple):
    """A speculative copy. Its slot is pinned until the copy is made."""

    expert: int
    """Its number in the layer."""
    slot: int
    hold: Hold
    """In host memory."""
    copy: SpeculativeCopy


class WindowPool(SlotPool):
    """The slots of one layer.

    A miss is held in the host pool, which may have to read it from disk, and copied from there; kernels wait for the
    copy, the host does not. A layer that needs more experts than there are slots, or a long prefill, passes through a
    stage. At most one speculative load is under way.

    Args:
        memory: of all layers of the layout.
        member: the layer's number among these.
        layer: its flat ids.
        cache: of its experts by their numbers in the layer, and its slots.
        stages: of ``memory``.
        leads: reports what becomes of the host pool, which other windows share.
    """

    def __init__(
        self,
        memory: WindowMemory,
        member: int,
        layer: Span,
        cache: ExpertCache,
        tier: HostTier,
        stages: Stages,
        clock: KernelClock,
        operations: Operations[HostReads],
        leads: bool,
    ):
        assert len(layer) == memory.plan.experts[member] and cache.num_slots == memory.plan.slots[member]
        self.memory, self.cache, self.tier = memory, cache, tier
        self.speculative = SpeculativeLoads()
        self.member, self._layer = member, layer
        self._stages, self._clock, self._operations, self._leads = stages, clock, operations, leads
        self._device = memory.device
        self._base = np.int32(memory.plan.base(member))
        self._lends = member in memory.plan.lent
        self._speculated: _Speculated | None = None
        self._read_at = -1
        """When its kernel last read it, by ``clock``."""
        self._void = VoidExperts(cache)
        self._expected: NDArray[np.float32] | None = None
        operations.pools.append(self)

    @property
    def layout(self) -> RecordLayout:
        return self.memory.layout

    @property
    def capacity(self) -> int:
        return self.cache.num_slots

    def streams(self, choices: int, needed: int, experts: int) -> bool:
        return needed > self.capacity or (self.capacity < experts and streams(choices, experts, experts))

    def begin_step(self) -> LoadReport:
        with self._operations:
            self.cache.begin_step()
        return self.tier.source.begin_step() if self._leads else NOTHING

    def load_all(self) -> LoadReport:
        experts = np.arange(len(self._layer))
        assert self.capacity == len(experts) and self._base == 0, "not every expert has a row of its own number"
        with self._operations:
            acquired = self.cache.acquire(experts)
            assert (acquired.slots == experts).all()
            carried = self._bring(experts, acquired.slots)
            for failure in carried.failures:
                raise failure.error
            self._operations.loader.finish()
            return carried.report

    def find(self, experts: IntArray) -> tuple[NDArray[np.int32], LoadReport] | None:
        if self._speculated is not None or self._void or self._operations.interrupted:
            return None
        slots = self.cache.find(experts - self._layer.start)
        if slots is None:
            return None
        self._read_at = self._clock.step
        report = LoadReport(hits=len(experts), useful=self.speculative.use(experts - self._layer.start))
        return slots + self._base, report

    def hold(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        assert layer == self._layer
        with self._operations:
            wanted = experts - layer.start
            report = self._settle_speculative(wanted)
            acquired = self.cache.acquire(wanted)
            report += LoadReport(useful=self.speculative.use(wanted)) + self._evicted(acquired)
            hold = self._new_hold(experts, acquired.slots + self._base, View.WINDOW)
            hold.window_slots = acquired.slots
            if len(acquired.missing):
                carried = self._bring(acquired.missing, acquired.missing_slots)
                hold.failures = carried.failures
                report += carried.report
            misses = len(acquired.missing)
            return hold, report + LoadReport(hits=len(experts) - misses, misses=misses)

    def hold_streaming(self, layer: Span, experts: IntArray) -> tuple[Hold, LoadReport]:
        assert layer == self._layer
        with self._operations:
            wanted = experts - layer.start
            report = self._settle_speculative(wanted)
            stage, lent = self._stages.take(self.member)
            report += lent + LoadReport(useful=self.speculative.use(wanted))
            self._check_ahead(stage)
            self.cache.policy.use(wanted)
            self._stages.needs_whole_layers = 4 * len(wanted) >= 3 * len(layer)
            missing = self._stage_what_is_here(stage, wanted[~stage.filled[wanted]])
            if len(missing):
                report += self._fill(stage, missing)
                report += self._keep(stage, missing)
            if stage.ready is not None:
                self._device.wait(self._device.main, stage.ready)
            hold = self._new_hold(experts, wanted.astype(np.int32), stage.view)
            hold.failures = [stage.failures[expert] for expert in wanted.tolist() if expert in stage.failures]
            return hold, report + LoadReport(hits=len(wanted) - len(missing), misses=len(missing))

    def stream_ahead(self, layer: Span) -> LoadReport:
        if len(self._stages.each) < 2 or not self._stages.needs_whole_layers:
            return NOTHING
        with self._operations:
            stage, report = self._stages.take(self.member)
            missing = self._stage_what_is_here(stage, np.flatnonzero(~stage.filled[: len(layer)]))
            hold, found = self.tier.resident(layer, missing + layer.start)
            report += found
            if hold is not None:
                there = hold.experts - layer.start
                stage.ready = self.tier.forward(hold, self._rows(stage, there), stage.free)
                stage.filled[there] = True
                stage.ahead = hold
                report += self.tier.copied(len(there), streamed=True) + LoadReport(streamed=len(there))
            return report + self.tier.source.stream_ahead(layer)

    def settle(self, layer: Span) -> NoReturn:
        raise AssertionError("what does not fit into a window is staged")

    def start_hold(self, layer: Span, experts: IntArray) -> NoReturn:
        raise AssertionError("what does not fit into a window is staged")

    def finish_hold(self, layer: Span, hold: Hold) -> NoReturn:
        raise AssertionError("no hold of a window is started")

    def abandon(self, hold: Hold) -> NoReturn:
        raise AssertionError("no hold of a window is started")

    def release(self, hold: Hold) -> None:
        assert isinstance(hold, _WindowHold)
        with self._operations:
            if hold.generation != self._operations.generation:
                return
            self._operations.held -= 1
            if hold.window_slots is None:
                (stage,) = [stage for stage in self._stages.each if stage.view == hold.view]
                stage.read, stage.read_at = self._clock.now(), self._clock.step
            else:
                self._read_at = self._clock.step
                self.cache.release(hold.window_slots)
                self._void.add_released(failure.expert - self._layer.start for failure in hold.failures)
            self._operations.loader.queue.pump()
            self._operations.loader.reap()

    def empty(self) -> None:
        """Nothing is in a slot, under way or held any more. Whoever calls it has ended all copies."""
        self.cache.clear()
        self.speculative = SpeculativeLoads()
        self._speculated = None
        self._void.clear()
        self._stages.forget()

    def lend(self) -> LoadReport:
        """Nothing is in the slots any more: a stage is written where they were."""
        if self._speculated is not None:
            self._operations.loader.queue.cancel(self._speculated.copy)
            self._speculated = None
        self.cache.clear()
        self._void.clear()
        return LoadReport(wasted=self.speculative.finish())

    def residency(self, layer: Span) -> NDArray[np.uint8]:
        return residency_of(self.cache.slot_of, self.cache.pins)

    def absent(self, layer: Span) -> NDArray[np.bool_]:
        return self.cache.slot_of == ABSENT

    def enable_predictions(self) -> None:
        if self._expected is not None:
            return
        policy = PredictionAwarePolicy(self.cache.policy, len(self._layer))
        self.cache.policy, self._expected = policy, policy.expected
        self.tier.enable_predictions()

    def expect(self, layer: Span, probabilities: NDArray[np.float32] | float) -> None:
        assert self._expected is not None, "predictions are not enabled"
        self._expected[:] = probabilities
        self.tier.source.expect(layer, probabilities)

    def prefetch(self, layer: Span, experts: IntArray) -> LoadReport:
        with self._operations:
            report = self._note_landing()
            on_disk = self.tier.source.absent(layer)[experts - layer.start]
            if self._speculated is None:
                for expert in experts[~on_disk].tolist():
                    hold, found = self.tier.resident(layer, np.array([expert]))
                    report += found
                    if hold is not None:
                        report += self._speculate(hold)
                        break
            if on_disk.any():
                report += self.tier.source.prefetch(layer, experts[on_disk])
            self._operations.loader.queue.pump()
            return report

    def queued(self) -> int:
        """Speculative loads of this layer not copied yet; of the one that leads, also those that go to host memory."""
        own = int(self._speculated is not None)
        return own + self.tier.source.queued() if self._leads else own

    def close(self) -> None:
        """Whoever keeps the windows closes the copies and the host pools."""

    def _new_hold(self, experts: IntArray, slots: NDArray[np.int32], view: View) -> _WindowHold:
        self._operations.held += 1
        return _WindowHold(experts, slots, view, self._operations.generation)

    def _evicted(self, acquired: Acquisition) -> LoadReport:
        if not len(acquired.evicted):
            return NOTHING
        return LoadReport(wasted=self.speculative.evict(acquired.evicted), evicted=len(acquired.evicted))

    def _bring(self, missing: IntArray, slots: NDArray[np.int32]) -> Carried:
        """Copy experts into slots that were given to them; the kernels enqueued next wait for it."""
        carried = self.tier.bring(self._layer, missing + self._layer.start, self._slots(slots), self._readers())
        if carried.event is not None:
            self._device.wait(self._device.main, carried.event)
        return carried

    def _readers(self) -> Event:
        """Behind the kernels that may still read the window's rows, of which some are going to be written."""
        read_at = self._read_at
        if self._lends:
            self._stages.forget()
            read_at = max(read_at, *(stage.read_at for stage in self._stages.each))
        return self._clock.now() if read_at == self._clock.step else self._clock.step_began

    def _stage_what_is_here(self, stage: Stage, experts: IntArray) -> IntArray:
        """Copy those of ``experts`` that are in the window to a stage, and return the others."""
        slots = self.cache.slot_of[experts]
        here = (slots != ABSENT) & ~np.isin(experts, list(self._void))
        if self._speculated is not None:
            here &= experts != self._speculated.expert
        if here.any():
            targets = self._rows(stage, experts[here])
            stage.ready = self._operations.loader.queue.demand(copies(targets, self._slots(slots[here]), stage.free))
            stage.filled[experts[here]] = True
        return experts[~here]

    def _rows(self, stage: Stage, experts: IntArray) -> list[Parts]:
        return [self.memory.stage_row(stage.number, expert) for expert in experts.tolist()]

    def _slots(self, slots: IntArray) -> list[Parts]:
        return [self.memory.slot(self.member, slot) for slot in slots.tolist()]

    def _fill(self, stage: Stage, experts: IntArray) -> LoadReport:
        """Copy experts from host memory to a stage."""
        flat = experts + self._layer.start
        carried = self.tier.bring(self._layer, flat, self._rows(stage, experts), stage.free, streaming=True)
        stage.filled[experts] = True
        stage.failures |= {failure.expert - self._layer.start: failure for failure in carried.failures}
        stage.ready = stage.ready if carried.event is None else carried.event
        return carried.report

    def _keep(self, stage: Stage, experts: IntArray) -> LoadReport:
        """Fill free slots, and those that were filled like this before, with what has just come to the stage."""
        if self._lends:
            return NOTHING
        good = np.array([expert for expert in experts.tolist() if expert not in stage.failures], dtype=np.int64)
        kept = self.cache.stream_ahead(good, share=0)
        if not len(kept.missing):
            return NOTHING
        targets, sources = self._slots(kept.missing_slots), self._rows(stage, kept.missing)
        stage.ready = self._operations.loader.queue.demand(copies(targets, sources, self._readers()))
        self.cache.release(kept.missing_slots)
        return self._evicted(kept)

    def _speculate(self, hold: Hold) -> LoadReport:
        """Copy the expert that is held in host memory when nothing is demanded, if a slot can be spared for it."""
        expert = int(hold.experts[0]) - self._layer.start
        admitted = self.cache.admit(np.array([expert]))
        if not len(admitted.missing):
            self.tier.source.release(hold)
            return NOTHING
        slot = int(admitted.missing_slots[0])
        copy = self.tier.speculate(hold, self.memory.slot(self.member, slot), self._readers())
        self._speculated = _Speculated(expert, slot, hold, copy)
        evicted = self._evicted(admitted)
        self.speculative.start(admitted.missing)
        return evicted + LoadReport(started=1)

    def _note_landing(self) -> LoadReport:
        """Unpin the slot of a speculative load whose copy has been made."""
        speculated = self._speculated
        if speculated is None or not self._operations.loader.queue.settled(speculated.copy):
            return NOTHING
        return self._end_speculative(speculated)

    def _end_speculative(self, speculated: _Speculated) -> LoadReport:
        """Its copy has been made, or kernels wait for it."""
        self.cache.release(np.array([speculated.slot]))
        self._speculated = None
        if self.tier.failures(speculated.hold):
            return self._undo_speculative(speculated)
        return self.tier.copied(1, prefetched=True)

    def _undo_speculative(self, speculated: _Speculated) -> LoadReport:
        self.cache.forget(np.array([speculated.expert]))
        self.speculative.cancel(speculated.expert)
        return LoadReport(withdrawn=1)

    def _check_ahead(self, stage: Stage) -> None:
        """What was taken away while a stage was filled ahead is not in it."""
        ahead, stage.ahead = stage.ahead, None
        if ahead is not None:
            lost = [failure.expert - self._layer.start for failure in self.tier.failures(ahead)]
            stage.filled[lost] = False

    def _settle_speculative(self, wanted: IntArray) -> LoadReport:
        """The layer needs ``wanted``: have kernels wait for the speculative one if it is among them, else take it back.

        A wrong one that is on its way as a whole keeps its slot, unless the layer cannot do without.
        """
        report = self._note_landing()
        speculated, queue = self._speculated, self._operations.loader.queue
        if speculated is None:
            return report
        if speculated.expert in wanted:
            self._device.wait(self._device.main, queue.promote(speculated.copy))
            report += self._end_speculative(speculated)
            return report + LoadReport(late=self.speculative.use(np.array([speculated.expert])))
        if speculated.copy.pieces or len(wanted) == self.capacity:
            queue.cancel(speculated.copy)
            self.cache.release(np.array([speculated.slot]))
            self._speculated = None
            return report + self._undo_speculative(speculated)
        return report
