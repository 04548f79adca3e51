"""Windows that a GPU manages by itself, as the layers and steps of one model see them.

Routing that comes back from the device comes a step or two late.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from ...device import Device
from ...device.base import RegistrationError
from ...device.registered import RegisteredMemory
from ...pool import HostPool
from ...runtime import Batch, OffloadRuntime, RoutingQueue
from ...stats import Stats
from ...store.layout import RecordLayout
from ...store.manifest import LayerEntry
from ...store.pools import pools_of
from ...windows.device_managed import DeviceManaged, ManagedLayer
from ...windows.memory import View, WindowMemory
from ...windows.plan import WindowPlan
from ...windows.speculative_loads import DeviceSpeculation, HeadSizes, SpeculativeKernels
from ...windows.step_log import RoutedStep

if TYPE_CHECKING:
    from ...prefetch.device_prefetcher import DevicePrefetcher  # imports a compiler


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
        stats: of the model; what the device does is added to them when it is known here.
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
        kernels: SpeculativeKernels,
        stats: Stats,
        *,
        top_k: int,
        most_rows: int,
        gathered_rows: int,
        record_of: Sequence[NDArray[np.int32] | None] | None = None,
    ):
        self._device, self._records, self._kernels, self._stats = device, records, kernels, stats
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
        self._batch: Batch | None = None
        """Of the running step. Passes outside of steps serve no request."""
        self._is_queued = False
        """Whether the queue knows the running step."""
        self._served = False
        """Whether a step has begun yet."""
        self._runtime: OffloadRuntime | None = None
        self.prefetcher: DevicePrefetcher | None = None
        """Has the device predict."""

    @property
    def slots(self) -> int:
        return sum(layer.window.slots for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """Of records, that windows can hold."""
        return sum(layer.window.slots * size for layer, size in zip(self.layers, self._record_bytes, strict=True))

    def serve_for(self, runtime: OffloadRuntime) -> None:
        """From now on ``runtime`` hears late of steps, from here, and through its queue."""
        self._runtime, runtime.queue = runtime, RoutingQueue(runtime.activity)

    def predict(self, sizes: HeadSizes) -> DeviceSpeculation:
        """Make room for heads. Before any graph is captured."""
        return self._windows.speculate(sizes, self._kernels)

    def begin_with(self, prefetcher: "DevicePrefetcher") -> None:
        """From now on ``prefetcher`` hears of passes before they are enqueued, and of steps when they are known."""
        assert self._queue is not None, "late routing goes through the runtime's queue"
        self.prefetcher = self._queue.consumer = prefetcher

    def begin_step(self, batch: Batch) -> None:
        """A step has been scheduled, and is enqueued next. Without tokens it only says which requests have ended.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        self.end_step()
        if not batch.tokens:
            self._note(self._windows.finished())  # there is no pass that this could delay
            return
        if not self._served:
            self._windows.reset()
        self._served, self._batch, self._is_queued = True, batch, False
        self._windows.begin_step()
        self._real_rows.fill_(batch.tokens)
        if batch.tokens > max(self._gathered_rows, self._windows.narrow_rows):
            self._warm(batch)

    def begin_pass(self) -> None:
        """The batch of the running step has been put together; its pass is enqueued next. Outside of graphs."""
        batch, queue = self._batch, self._queue
        if batch is None or self._is_queued or queue is None:
            return
        self._note(self._windows.finished(wait=False))
        rows, self._is_queued = queue.add(self._windows.step, batch), True
        if self.prefetcher is not None:
            self.prefetcher.begin_step(rows, queue.embeddings, batch.wait_for_tokens)

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
        if self._batch is None and rows > self._gathered_rows:
            return View.WINDOW, ids
        if rows <= self._windows.narrow_rows:
            return View.WINDOW, self._windows.launch(layer, ids, weights, self._real_rows)
        if rows > self._gathered_rows:
            whole = self._experts[layer] * self._record_bytes[layer]
            self._stats.copied_bytes += whole
            self._stats.copied_streamed_bytes += whole
        return self._windows.launch_wide(layer, ids, weights, self._real_rows), ids

    def expert_map(self, layer: int, view: View) -> torch.Tensor | None:
        """What the kernel maps ids of ``serve`` with, where ranks share out experts."""
        return self._windows.expert_map(layer, view)

    def end_step(self) -> None:
        """The step has been enqueued: take what is known by now of it and those before. Without effect outside of one.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return
        if self._queue is not None and not self._is_queued:
            self._queue.add(self._windows.step, batch)
        self._note(self._windows.read_back(batch.tokens))

    def close(self) -> None:
        """No step follows: requests end, and the host memory may go. Idempotent.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        try:
            self.end_step()
            self._note(self._windows.finished())
        finally:
            if self._queue is not None:
                self._queue.close()
        self._device.synchronize(self._device.record(self._device.main))
        self._records.close()

    @property
    def _queue(self) -> RoutingQueue | None:
        return None if self._runtime is None else self._runtime.queue

    def _warm(self, batch: Batch) -> None:
        """The step passes all experts through stages: windows take those that requests which begin are going to use."""
        if self._runtime is None or self._runtime.warm_start is None:
            return
        wanted = self._runtime.warm_start.experts_for(batch, [layer.window.slots for layer in self.layers])
        if wanted is not None:
            self._windows.warm(wanted)

    def _own(self, ids: NDArray[np.int16]) -> NDArray[np.integer]:
        """``ids [layers, …]`` in the numbers of this rank's experts, negative where another has it."""
        maps = [layer.record_of for layer in self.layers]
        if all(numbers is None for numbers in maps):
            return ids
        return np.stack(
            [
                of_layer if numbers is None else np.where(of_layer < 0, of_layer, numbers[of_layer])
                for of_layer, numbers in zip(ids, maps, strict=True)
            ]
        )

    def _note(self, steps: Sequence[RoutedStep]) -> None:
        """Count what the device has done in ``steps``, and trace them."""
        stats = self._stats
        for step in steps:
            if self.prefetcher is not None:
                self.prefetcher.note_time(step.number, step.seconds)
            misses = int(step.misses.sum())
            stats.hits += int(step.used.sum()) - misses
            stats.misses += misses
            stats.host_hits += misses
            demanded, speculated = (int(records @ self._record_bytes) for records in (step.misses, step.started))
            stats.copied_bytes += demanded + speculated
            stats.copied_demanded_bytes += demanded
            stats.copied_prefetched_bytes += speculated
            stats.prefetches += int(step.started.sum())
            stats.prefetch_useful += int(step.useful.sum())
            stats.prefetch_wasted += int(step.wasted.sum())
            stats.warmed += int(step.warmed.sum())
            if self._queue is not None:
                self._queue.end_step(step, self._own(step.ids))
