"""Windows that the device manages by itself: one engine's, with no decision of the host inside a step.

Host memory holds all records where the device reads them. Everything is enqueued on the stream of vLLM's kernels but
the copies of a wide step too large for a graph and what comes back to the host, so the order of streams is all the
protection that slots and tables need.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..device.base import Device, Event
from ..device.registered import RegisteredMemory
from .device_tables import DeviceTables, Kernels, Window, zeros
from .memory import View, WindowMemory
from .speculation import DISTANCE, THRESHOLD
from .speculative_loads import DeviceSpeculation, HeadSizes, SpeculativeKernels
from .step_log import RoutedStep, StepLog
from .warming import Warming

_LANES = (16, 8, 1)


class ManagedLayer(NamedTuple):
    """Where one layer's records are and where they go."""

    memory: WindowMemory
    member: int
    host: RegisteredMemory
    first: int
    """The record of its expert 0."""
    record_of: NDArray[np.int32] | None = None
    """Where ranks share out the experts: by id, the number of the record on this rank, or -1."""

    @property
    def window(self) -> Window:
        plan = self.memory.plan
        experts = plan.experts[self.member] if self.record_of is None else len(self.record_of)
        is_lent = self.member in plan.lent
        return Window(experts, plan.slots[self.member], plan.base(self.member), is_lent, self.record_of)

    @property
    def stage(self) -> int:
        """Neighbours have different ones, if there are two."""
        return self.member % len(self.memory.plan.stages)

    @property
    def stage_view(self) -> View:
        return View(View.STAGE_0 + self.stage)

    def shares_stage(self, other: "ManagedLayer") -> bool:
        return self.memory is other.memory and self.stage == other.stage


class DeviceManaged:
    """The layers of one model, numbered in the order in which a step runs them.

    ``launch`` and ``launch_wide`` may be captured in a graph where ``rows`` are at most ``gathered_rows``: they
    neither allocate nor wait for the device. All layers of a step are launched narrow, or all wide. ``read_back`` ends
    every step, also one that was left early.

    Args:
        top_k: choices of a row.
        most_rows: of any step, padding included.
        gathered_rows: wide steps of at most so many bring in what they use; larger ones all experts of each layer,
            the next while one computes.
    """

    def __init__(
        self,
        device: Device,
        layers: Sequence[ManagedLayer],
        kernels: Kernels,
        *,
        top_k: int,
        most_rows: int,
        gathered_rows: int,
    ):
        self._device, self._layers, self._kernels = device, layers, kernels
        self._gathered_rows = gathered_rows
        self._most_rows = most_rows
        self.tables = DeviceTables(device, [layer.window for layer in layers])
        self._into_window = [_components(device, layer, View.WINDOW) for layer in layers]
        self._into_stage = [_components(device, layer, layer.stage_view) for layer in layers]
        out_of_stage = [_components(device, layer, View.WINDOW, from_stage=True) for layer in layers]
        record_bytes = [layer.memory.layout.payload_bytes for layer in layers]
        self._log = StepLog(device, kernels, record_bytes, top_k, most_rows)
        self._warming = Warming(device, self.tables, out_of_stage, kernels, self._log.ring)
        self.narrow_rows = min(layer.window.slots for layer in layers) // top_k
        """Steps of more rows are wide."""
        self._misses = zeros(device, (1 + 3 * self.tables.most_experts,), torch.int32)
        most_ids = self.narrow_rows * top_k
        self._out = {dtype: zeros(device, (most_ids,), dtype) for dtype in (torch.int32, torch.int64, torch.uint32)}
        self._speculation: DeviceSpeculation | None = None
        self._copies = device.stream("stages")
        self._fills: dict[int, Event] = {}
        """By layer, behind the copies of all its experts to its stage that main has not waited for."""

    def speculate(
        self, sizes: HeadSizes, kernels: SpeculativeKernels, *, distance: int = DISTANCE, threshold: float = THRESHOLD
    ) -> DeviceSpeculation:
        """From now on narrow steps of few rows load ahead, as soon as there are heads and what is known of their rows.

        Before any graph is captured.
        """
        self._speculation = DeviceSpeculation(
            self._device,
            sizes,
            self.tables,
            self._into_window,
            kernels,
            self._log.ring,
            distance=distance,
            threshold=threshold,
        )
        return self._speculation

    def begin_step(self) -> None:
        """A step is enqueued next, outside of graphs or as one."""
        self._log.begin_step()
        if self._speculation is not None:
            self._speculation.begin_step(self._log.step)

    def launch(
        self,
        layer: int,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        real_rows: torch.Tensor,
    ) -> torch.Tensor:
        """Bring a narrow step's experts into the window of ``layer``.

        Args:
            topk_ids: ``[rows, top_k]`` on the device, contiguous.
            topk_weights: likewise; what the router gave them.
            real_rows: int32 ``[1]`` on the device; rows behind them are padding.

        Returns:
            ids for the layer's kernel over ``View.WINDOW``, good until the next launch; with an ``expert_map``, those
            of the experts, rows of padding as row 0.
        """
        assert len(topk_ids) <= self.narrow_rows, "a wide step is served through stages"
        assert topk_ids.is_contiguous() and topk_weights.is_contiguous()
        out = self._out[topk_ids.dtype][: topk_ids.numel()].view(topk_ids.shape)
        if self._speculation is not None:
            self._speculation.join()
        tables, ring = self.tables.layers[layer], self._log.ring
        self._kernels.manage(tables, topk_ids, topk_weights, real_rows, out, self._misses, ring)
        self._kernels.gather(tables, self._into_window[layer], self._misses, ring)
        if self._speculation is not None:
            self._speculation.follow(layer, topk_ids, topk_weights)
        return out

    def launch_wide(
        self, layer: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor, real_rows: torch.Tensor
    ) -> View:
        """Bring a wide step's experts into a stage; the kernel is shown the view returned, and ``topk_ids``."""
        assert topk_ids.is_contiguous() and topk_weights.is_contiguous(), "kernels read them one after the other"
        assert len(topk_ids) <= self._most_rows, "and write them one after the other"
        if layer == 0:
            self._begin_wide()
        managed, tables, ring = self._layers[layer], self.tables.layers[layer], self._log.ring
        if len(topk_ids) <= self._gathered_rows:
            self._kernels.stage(tables, topk_ids, topk_weights, real_rows, self._misses, ring)
            self._kernels.gather(tables, self._into_stage[layer], self._misses, ring)
        else:
            self._kernels.note(tables, topk_ids, topk_weights, real_rows, ring)
            self._fill(layer)
            if layer + 1 < len(self._layers) and not managed.shares_stage(self._layers[layer + 1]):
                self._fill(layer + 1)
            self._device.wait(self._device.main, self._fills.pop(layer))
            self._warming.follow(layer)
        return managed.stage_view

    def expert_map(self, layer: int, view: View) -> torch.Tensor | None:
        """int32 ``[experts of all ranks]``: what the kernel maps ids with, where ranks share out the experts."""
        tables = self.tables.layers[layer]
        if tables.window.record_of is None:
            return None
        return tables.row_of if view == View.WINDOW else tables.record_of

    def warm(self, experts: Sequence[NDArray[np.integer]]) -> bool:
        """Bring ``experts`` of each layer into its window in the next step, if that has more than ``gathered_rows``.

        Between ``read_back`` and the next step. ``Warming.give`` says more.
        """
        return self._warming.give(experts)

    def read_back(self, rows: int) -> list[RoutedStep]:
        """End a step of so many ``rows`` at most, padding left out; what is known by now of this and earlier ones.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        self._settle()
        if self._speculation is not None:
            self._speculation.end_step()
        self._warming.end_step()
        self._log.end_step(rows)
        return self._log.finished()

    @property
    def step(self) -> int:
        """The number of the step that is next or under way."""
        return self._log.step

    def finished(self, wait: bool = True) -> list[RoutedStep]:
        """What ``read_back`` has not returned yet of the steps that it has ended: all, or what has come by now.

        Raises:
            DeviceError: the device cannot be used any more.
        """
        return self._log.finished(wait)

    def reset(self) -> None:
        """All windows are empty: what was routed so far only warmed the engine up."""
        self._kernels.reset(self.tables)

    def _begin_wide(self) -> None:
        """Stages are about to be written: windows that are lent to them are empty."""
        self._settle()
        self._kernels.forget(self.tables)

    def _fill(self, layer: int) -> None:
        """Start the copies of all experts of ``layer`` to its stage, behind the kernels enqueued so far.

        These include the last one that reads the stage, and ``forget``.
        """
        if layer in self._fills:
            return
        managed = self._layers[layer]
        self._device.wait(self._copies, self._device.record(self._device.main))
        targets = managed.memory.tensors(managed.member, managed.stage_view)
        records = range(managed.first, managed.first + managed.memory.plan.experts[managed.member])
        for component, target in enumerate(targets):
            if not target.nbytes:
                continue
            parts = managed.host.parts(component, records)
            for rows, part in zip(target.split([len(part) for part in parts]), parts, strict=True):
                self._device.copy(self._copies, rows.reshape(-1), torch.from_numpy(part.reshape(-1)))
        self._fills[layer] = self._device.record(self._copies)

    def _settle(self) -> None:
        """Main waits for copies to stages, and speculative loads, of a step that was left early."""
        if self._speculation is not None:
            self._speculation.join()
        for event in self._fills.values():
            self._device.wait(self._device.main, event)
        self._fills.clear()


def _components(device: Device, layer: ManagedLayer, view: View, from_stage: bool = False) -> torch.Tensor:
    """The table by which ``kernels.gather`` finds the components of ``layer``.

    Args:
        view: where records go.
        from_stage: they come from there, each from the row of its number, instead of from host memory.
    """
    memory, member = layer.memory, layer.member
    to_window = view == View.WINDOW
    targets = memory.slot(member, 0) if to_window else memory.stage_row(layer.stage, 0)
    rows = []
    places = zip(targets, memory.slot(member, 0), memory.stage_row(layer.stage, 0), strict=True)
    for component, (target, window, staged) in enumerate(places):
        nbytes = target.nbytes
        host = layer.host.address(component) + layer.first * nbytes
        numbers = target.data_ptr(), staged.data_ptr() if from_stage else host, window.data_ptr(), nbytes
        rows.append((*numbers, next(lane for lane in _LANES if all(number % lane == 0 for number in numbers))))
    components = zeros(device, (len(rows), len(rows[0])), torch.int64)
    components.copy_(torch.tensor(rows))
    return components
