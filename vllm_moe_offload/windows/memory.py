"""The device memory of one record layout: windows of all its layers, and stages."""

from collections.abc import Iterator
from enum import IntEnum
from itertools import accumulate

import torch

from ..device.base import Device
from ..store.layout import RecordLayout
from .plan import WindowPlan, is_shared, rounded


class View(IntEnum):
    """Which rows a kernel is shown."""

    WINDOW = 0
    """Those around the layer's own slots; ids are ``plan.base(member) + slot``."""
    STAGE_0 = 1
    """A stage; ids are expert numbers."""
    STAGE_1 = 2
    """The other one, where the plan has two."""


class WindowMemory:
    """Takes the memory once; zero at first, and never moved.

    Raises:
        OutOfDeviceMemoryError: the device has less than ``plan.nbytes``.
    """

    def __init__(self, device: Device, layout: RecordLayout, plan: WindowPlan):
        self.device, self.layout, self.plan = device, layout, plan
        self._buffers: list[torch.Tensor] = []
        per_component = [list(self._blocks(component.nbytes)) for component in layout.components]
        blocks: list[tuple[torch.Tensor, ...]] = list(zip(*per_component, strict=True))
        self._windows, self._stages = blocks[: len(plan.experts)], blocks[len(plan.experts) :]
        assert sum(buffer.nbytes for buffer in self._buffers) == plan.nbytes([c.nbytes for c in layout.components])

    @property
    def views(self) -> tuple[View, ...]:
        """Those that there are."""
        return tuple(View)[: 1 + len(self._stages)]

    def tensors(self, member: int, view: View) -> tuple[torch.Tensor, ...]:
        """What the kernel of ``member`` is shown: per component uint8 ``[experts, nbytes]``, contiguous."""
        if view == View.WINDOW:
            return self._windows[member]
        return tuple(rows[: self.plan.experts[member]] for rows in self._stages[view - View.STAGE_0])

    def slot(self, member: int, slot: int) -> tuple[torch.Tensor, ...]:
        """One slot of a window, to copy a record to: per component uint8 ``[nbytes]``."""
        assert 0 <= slot < self.plan.slots[member]
        row = self.plan.base(member) + slot
        return tuple(rows[row] for rows in self._windows[member])

    def stage_row(self, stage: int, expert: int) -> tuple[torch.Tensor, ...]:
        """Where ``expert`` of whatever layer uses stage 0 or 1 belongs: per component uint8 ``[nbytes]``."""
        return tuple(rows[expert] for rows in self._stages[stage])

    def clear(self) -> None:
        """Enqueue zeros for everything on torch's current stream."""
        for buffer in self._buffers:
            buffer.zero_()

    def _blocks(self, nbytes: int) -> Iterator[torch.Tensor]:
        """One component: the view around the window of each member, then the stages; ``[rows, nbytes]`` each."""
        plan = self.plan
        counts = (*plan.experts, *(plan.stage_rows for _ in plan.stages))
        if is_shared(nbytes):
            begins = [row * nbytes for row in (*plan.begins, *plan.stages)]
            size = rounded(plan.rows * nbytes)
        else:
            *begins, size = accumulate((rounded(count * nbytes) for count in counts), initial=0)
        buffer = self.device.allocate(size)
        self._buffers.append(buffer)
        for begin, count in zip(begins, counts, strict=True):
            yield buffer[begin : begin + count * nbytes].view(count, nbytes)
