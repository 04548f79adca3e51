"""Experts come into windows out of stages, while a step passes all experts of each layer through the stages.

Such a step waits for the link between host and device, and what a window takes has crossed it already: the copy is one
within the device's memory, at many times the link's speed, while the next layer is on its way. Loads between
steps would delay the next one by as much as they could save later: misses are loaded on the same stream.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device, Event
from .device_tables import DeviceTables, Kernels, LayerTables, Ring, zeros
from .step_log import AHEAD


class Warming:
    """Of one model's windows.

    Args:
        out_of_stage: by layer the table by which ``gather`` copies records from its stage to its window.
        ring: that of the steps; has notes for what is done here behind those of the layers.
    """

    def __init__(
        self, device: Device, tables: DeviceTables, out_of_stage: Sequence[torch.Tensor], kernels: Kernels, ring: Ring
    ):
        self._device, self._kernels, self._ring, self._out_of_stage = device, kernels, ring, out_of_stage
        layers = len(tables.layers)
        self._tables = [LayerTables(layers + layer.number, layer.window, layer.tables) for layer in tables.layers]
        most = max(layer.window.slots for layer in tables.layers)
        self._ids = zeros(device, (layers, most), torch.int32)
        self._staged = [device.allocate_pinned(self._ids.nbytes) for _ in range(AHEAD + 1)]
        self._copied: list[Event | None] = [None] * len(self._staged)
        self._given = 0
        self._counts = [0] * layers
        """By layer, the experts that are wanted in the running step."""
        self._out = zeros(device, (most,), torch.int32)
        self._misses = zeros(device, (1 + 3 * most,), torch.int32)
        self._no_weights = zeros(device, (most,), torch.float32)
        self._one_row = zeros(device, (1,), torch.int32)
        self._one_row.fill_(1)

    def give(self, experts: Sequence[NDArray[np.integer]]) -> bool:
        """Before a step: by layer, distinct experts that its window is to have, at most as many as it has slots.

        Returns:
            whether they are going to be brought in, if the step is one that passes all experts through the stages: not
            where the host is further ahead than an engine.
        """
        place = self._given % len(self._staged)
        event = self._copied[place]
        if event is not None and not self._device.finished(event):
            return False
        staged = self._staged[place].view(torch.int32).view(self._ids.shape).numpy()
        for layer, wanted in enumerate(experts):
            assert len(wanted) <= self._tables[layer].window.slots
            staged[layer, : len(wanted)] = wanted
        self._device.copy(self._device.main, self._ids.view(-1).view(torch.uint8), self._staged[place])
        self._copied[place] = self._device.record(self._device.main)
        self._counts = [len(wanted) for wanted in experts]
        self._given += 1
        return True

    def follow(self, layer: int) -> None:
        """All experts of ``layer`` are in its stage for what main does next. A use of each that is wanted.

        A lent window is left alone: stages are going to overwrite it in the same step.
        """
        count, tables = self._counts[layer], self._tables[layer]
        if not count or tables.window.is_lent:
            return
        ids, out = self._ids[layer, :count].view(1, -1), self._out[:count].view(1, -1)
        weights = self._no_weights[:count].view(1, -1)
        self._kernels.manage(tables, ids, weights, self._one_row, out, self._misses, self._ring, keeps=False)
        self._kernels.gather(tables, self._out_of_stage[layer], self._misses, self._ring)

    def end_step(self) -> None:
        """Nothing is wanted any more."""
        self._counts = [0] * len(self._counts)
