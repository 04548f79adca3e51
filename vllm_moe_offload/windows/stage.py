"""Stages: rows for all experts of one layer, through which a step passes that needs more of them than its window holds.

Two stages take turns, so that one is filled while a kernel reads the other. The rows are lent by windows, which hold
nothing any more once a stage has been written.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..device.base import Device, Event
from ..load_report import NOTHING, LoadReport
from ..pool.base import Failure, Hold
from .memory import View, WindowMemory


class Lender(Protocol):
    """A window whose rows are lent to stages."""

    def lend(self) -> LoadReport:
        """Nothing is in its slots any more."""


class Stage:
    """What is in a stage, and the events that say when it may be read and written."""

    def __init__(self, view: View, rows: int):
        self.view = view
        self.member: int | None = None
        """The layer whose experts are in it; None where nothing is known of its contents."""
        self.filled = np.zeros(rows, dtype=bool)
        """Experts that are there or whose copies have been enqueued."""
        self.failures: dict[int, Failure] = {}
        """By expert, those that could not be read."""
        self.free: Event | None = None
        """What copies to it wait for: the kernels that read it, or the windows that lend it, before."""
        self.ahead: Hold | None = None
        """What it was filled from before its layer was reached."""
        self.ready: Event | None = None
        """Behind the copies to it."""
        self.read: Event | None = None
        """Behind the last kernel that reads it."""
        self.read_at = -1
        """The step of that kernel."""

    @property
    def number(self) -> int:
        """From 0."""
        return self.view - View.STAGE_0


class Stages:
    """The stages of one memory, and when they may be written.

    Args:
        memory: lends their rows.
    """

    def __init__(self, device: Device, memory: WindowMemory):
        self._device = device
        views = [view for view in memory.views if view != View.WINDOW]
        self.each = [Stage(view, memory.plan.stage_rows) for view in views]
        self.lenders: Sequence[Lender] = ()
        self.needs_whole_layers = False
        """Whether the layer staged last needed nearly all of its experts: the next one will, too."""
        self._lent = False
        """Whether the windows have been taken back, and nothing has been written to them since."""

    def take(self, member: int) -> tuple[Stage, LoadReport]:
        """The stage for a layer: it has some of its experts already, or none."""
        report = NOTHING
        if not self._lent:
            for window in self.lenders:
                report += window.lend()
            self._lent = True
            begins = self._device.record(self._device.main)
            for stage in self.each:
                stage.free, stage.read = begins, None
        stage = next((stage for stage in self.each if stage.member == member), self.each[0])
        if stage.member == member:
            return stage, report
        self.each = [*self.each[1:], stage]
        stage.member = member
        stage.filled[:] = False
        stage.failures.clear()
        stage.ready = stage.ahead = None
        stage.free = stage.free if stage.read is None else stage.read
        return stage, report

    def forget(self) -> None:
        """What is in the stages is of no use any more: windows that lend their rows are going to be used."""
        self._lent = False
        for stage in self.each:
            stage.member = None
