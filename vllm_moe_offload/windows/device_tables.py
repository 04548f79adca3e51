"""What is kept in a device's memory so that its kernels decide which experts are in its windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device
from .kernels import NOTE, RING, TABLES
from .tables import ABSENT


@dataclass(frozen=True)
class Window:
    """One layer, as far as kernels need to know it."""

    experts: int
    """Ids are smaller. With expert parallelism, those of all ranks."""
    slots: int
    base: int
    """The row of slot 0 in what the layer's kernel is shown."""
    is_lent: bool
    """A stage overwrites it."""
    record_of: NDArray[np.int32] | None = None
    """``[experts]``: the number of each one's record on this rank, or -1. None: ids are the numbers of records."""


class LayerTables:
    """Views of one layer in ``DeviceTables``."""

    def __init__(self, number: int, window: Window, tables: torch.Tensor):
        self.number, self.window, self.tables = number, window, tables
        by_expert = tables[:4, : window.experts]
        self.row_of, self.heat, self.epoch, self.record_of = by_expert
        """int32 ``[experts]``, as ``kernels`` says. The first is the expert map of the layer's kernel where ranks share
        out the experts; the last one is that for a stage."""
        self.expert_of = tables[4, : window.slots]
        self.mark = tables[5, : window.experts]
        """int32 ``[experts]``: of speculative loads."""


class DeviceTables:
    """The tables of all layers; all windows are empty at first. Addresses do not change."""

    def __init__(self, device: Device, windows: Sequence[Window]):
        self.most_experts = max(window.experts for window in windows)
        width = -(-self.most_experts // 64) * 64
        self.tables = zeros(device, (len(windows), TABLES, width), torch.int32)
        self.tables[:, 0], self.tables[:, 4] = ABSENT, ABSENT
        self.lent = zeros(device, (len(windows), 1), torch.bool)
        """Layers whose windows stages overwrite."""
        self.layers: list[LayerTables] = []
        for number, window in enumerate(windows):
            layer = LayerTables(number, window, self.tables[number])
            records = np.arange(window.experts, dtype=np.int32) if window.record_of is None else window.record_of
            layer.record_of.copy_(torch.from_numpy(records))
            self.lent[number] = window.is_lent
            self.layers.append(layer)


class Ring:
    """What the last steps did; ``kernels`` says how.

    Args:
        length: steps that are kept.
        notes: of one step.
        room: choices of all layers in one step, at most.
    """

    def __init__(self, device: Device, length: int, notes: int, room: int):
        self.choices = zeros(device, (length, room), torch.int32)
        self.notes = zeros(device, (length, notes, NOTE), torch.int64)
        self.header = zeros(device, (RING,), torch.int64)
        self.header.copy_(torch.tensor([1, length, room, notes, self.choices.data_ptr(), self.notes.data_ptr()]))
        self.step = self.header[:1]
        """The number of the step that is next or under way, from 1: notes without a step say 0."""


class Kernels(Protocol):
    """Work that is enqueued on the stream where vLLM's kernels run, behind what has been enqueued there.

    Ids and the router's weights are ``[T, top_k]``, contiguous; ``real_rows`` int32 ``[1]``, and rows behind them are
    padding. Choices of real rows go into the ring.
    """

    def manage(
        self,
        layer: LayerTables,
        ids: torch.Tensor,
        weights: torch.Tensor,
        real_rows: torch.Tensor,
        out: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
        keeps: bool = True,
    ) -> None:
        """``WindowTables.serve``: rewrite ``ids`` to rows in ``out``, or keep them where the table of rows is the
        kernel's expert map, and list what is missing. Choices go into the ring if ``keeps``."""

    def stage(
        self,
        layer: LayerTables,
        ids: torch.Tensor,
        weights: torch.Tensor,
        real_rows: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
    ) -> None:
        """List all that a step uses which is too wide for the window, for the stage."""

    def gather(
        self,
        layer: LayerTables,
        components: torch.Tensor,
        misses: torch.Tensor,
        ring: Ring,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Copy what is listed to where ``components`` says, or one of so many parts of each record."""

    def note(
        self, layer: LayerTables, ids: torch.Tensor, weights: torch.Tensor, real_rows: torch.Tensor, ring: Ring
    ) -> None:
        """Write choices into the ring where nothing else looks at them."""

    def forget(self, tables: DeviceTables) -> None:
        """The windows that are lent are empty."""

    def reset(self, tables: DeviceTables) -> None:
        """All windows are empty, and no expert has been used."""

    def advance(self, ring: Ring) -> None:
        """The next step begins."""


def zeros(device: Device, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the device for good."""
    count = int(np.prod(shape))
    return device.allocate(count * dtype.itemsize).view(dtype).view(shape)
