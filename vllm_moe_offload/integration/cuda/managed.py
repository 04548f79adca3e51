"""Windows that a GPU manages by itself, as the layers and steps of one model see them.

Routing that comes back from the device comes a step or two late.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ...device import Device
from ...device.base import RegistrationError
from ...device.registered import RegisteredMemory
from ...pool import HostPool
from ...stats import Stats
from ...store.layout import RecordLayout
from ...store.manifest import LayerEntry
from ...store.pools import pools_of
from ...windows.device_managed import DeviceManaged, ManagedLayer
from ...windows.device_tables import Kernels
from ...windows.memory import View, WindowMemory
from ...windows.plan import WindowPlan
from ...windows.step_log import RoutedStep


class RegisteredRecords:
    """Host pools that a device reads where they lie.

    Args:
        layers: of the store.
        host: their pools, with a slot for every expert.

    Raises:
        RegistrationError: the driver does not let the device read host memory; nothing is registered then.
    """

    def __init__(self, device: Device, layers: Sequence[LayerEntry], host: Mapping[str, HostPool]):
        self.of_layout: dict[RecordLayout, RegisteredMemory] = {}
        try:
            for members in pools_of(layers):
                tensors = host[layers[members.layers[0]].name].memory.tensors()
                registered = RegisteredMemory(device, [component.numpy() for component in tensors])
                self.of_layout[members.layout] = registered
                for component in range(len(tensors)):
                    registered.address(component)
        except RegistrationError:
            self.close()
            raise

    def close(self) -> None:
        """No work that reads the records may be enqueued or under way. Idempotent."""
        while self.of_layout:
            self.of_layout.popitem()[1].close()


class ManagedWindows:
    """Windows over host memory that holds every expert in the slot of its own number before the first step.

    Args:
        layers: of the store, in the order in which a step runs them.
        top_k: choices of a row, the same in every layer.
        most_rows: of a step, padding included.
        gathered_rows: of the largest captured graph, 0 where there are none.
        record_of: by layer, where ranks share out its experts: by expert, its number on this rank or -1.

    Raises:
        OutOfDeviceMemoryError: the device has less memory than these windows take.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[LayerEntry],
        plans: Mapping[RecordLayout, WindowPlan],
        records: RegisteredRecords,
        kernels: Kernels,
        *,
        top_k: int,
        most_rows: int,
        gathered_rows: int,
        record_of: Sequence[NDArray[np.int32] | None] | None = None,
    ):
        self._device, self._records = device, records
        shared_out = record_of or [None] * len(layers)
        managed: dict[int, ManagedLayer] = {}
        for members in pools_of(layers):
            memory = WindowMemory(device, members.layout, plans[members.layout])
            first = 0
            for member, index in enumerate(members.layers):
                of_layout = records.of_layout[members.layout]
                managed[index] = ManagedLayer(memory, member, of_layout, first, shared_out[index])
                first += members.counts[member]
        self.layers = [managed[index] for index in range(len(layers))]
        self._record_bytes = [entry.layout.payload_bytes for entry in layers]
        self._experts = [entry.experts for entry in layers]
        self._windows = DeviceManaged(
            device, self.layers, kernels, top_k=top_k, most_rows=most_rows, gathered_rows=gathered_rows
        )
        self._gathered_rows = gathered_rows
        self._real_rows = device.allocate(4).view(torch.int32)
        self._real_rows.fill_(0)
        self._rows = 0
        """Of the running step."""
        self._steps = 0
        self.runs = False
        """Whether a step runs. Passes outside of steps serve no request."""
        self.copied_whole = 0
        """Bytes of layers that were copied with all their experts."""

    @property
    def slots(self) -> int:
        return sum(layer.window.slots for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Of records, that windows can hold."""
        return sum(layer.window.slots * size for layer, size in zip(self.layers, self._record_bytes, strict=True))

    def begin_step(self, rows: int) -> None:
        """A step of so many rows has been scheduled, and is enqueued next."""
        if not self._steps:
            self._windows.reset()
        self._steps += 1
        self._rows, self.runs = rows, True
        self._real_rows.fill_(rows)

    def serve(self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[View, torch.Tensor]:
        """Bring what a layer needs to the device; enqueued, and never waited for. May be captured in a graph.

        Args:
            layer: counted in the order in which they run.
            topk_ids: ``[rows, top_k]`` on the device.
            topk_weights: likewise; what the router gave them.

        Returns:
            what the layer's kernel is to be shown, and the ids there of the experts chosen.
        """
        rows, ids, weights = len(topk_ids), topk_ids.contiguous(), topk_weights.contiguous()
        if not self.runs and rows > self._gathered_rows:
            return View.WINDOW, ids
        if rows <= self._windows.narrow_rows:
            return View.WINDOW, self._windows.launch(layer, ids, weights, self._real_rows)
        if rows > self._gathered_rows:
            self.copied_whole += self._experts[layer] * self._record_bytes[layer]
        return self._windows.launch_wide(layer, ids, weights, self._real_rows), ids

    def expert_map(self, layer: int, view: View) -> torch.Tensor | None:
        """What the kernel maps ids of ``serve`` with, where ranks share out experts."""
        return self._windows.expert_map(layer, view)

    def end_step(self) -> list[RoutedStep]:
        """The step has been enqueued. Returns what is known by now of this one and those before it.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        self.runs = False
        return self._windows.read_back(self._rows)

    def count(self, steps: Sequence[RoutedStep], stats: Stats) -> None:
        """Add what the device has done in ``steps``, and the copies of whole layers enqueued since the last call."""
        for step in steps:
            misses = int(step.misses.sum())
            stats.hits += int(step.used.sum()) - misses
            stats.misses += misses
            stats.host_hits += misses
            demanded, guessed = (int(records @ self._record_bytes) for records in (step.misses, step.started))
            stats.copied_bytes += demanded + guessed
            stats.copied_demanded_bytes += demanded
            stats.copied_prefetched_bytes += guessed
            stats.prefetches += int(step.started.sum())
            stats.prefetch_useful += int(step.useful.sum())
            stats.prefetch_wasted += int(step.wasted.sum())
        stats.copied_bytes += self.copied_whole
        stats.copied_streamed_bytes += self.copied_whole
        self.copied_whole = 0

    def close(self) -> None:
        """No step follows: the host memory may go. Idempotent."""
        if self.runs:
            self.end_step()
        self._device.synchronize(self._device.record(self._device.main))
        self._records.close()
