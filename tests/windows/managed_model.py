"""A model of a few layers over windows that a device manages, with records that tell which expert they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_moe_offload.device.base import Device
from vllm_moe_offload.device.registered import RegisteredMemory
from vllm_moe_offload.store.layout import Component, RecordLayout
from vllm_moe_offload.windows.device_managed import DeviceManaged, ManagedLayer
from vllm_moe_offload.windows.device_tables import Kernels
from vllm_moe_offload.windows.memory import View, WindowMemory
from vllm_moe_offload.windows.plan import WindowPlan

LAYOUT = RecordLayout(
    (
        Component("w", "uint8", (4096,), 4096),
        Component("scale", "uint8", (24,), 24),
        Component("order", "int32", (0,), 0),
    )
)
"""One component that windows share, one that has rows of its own, and one that stands for what a checkpoint lacks."""
Rows = list[tuple[torch.Tensor, ...]]


class HostRecords(RegisteredMemory):
    """All bytes of a record are alike; what is registered in one call ends after a few records."""

    def __init__(self, device: Device, records: int, layout: RecordLayout = LAYOUT):
        self.arrays = [whole(records, part.nbytes) for part in layout.components]
        for array in self.arrays:
            array[:] = marks(records)[:, None]
        super().__init__(device, self.arrays, chunk_bytes=3 * max(part.nbytes for part in layout.components))


def weights_of(ids: NDArray[np.integer]) -> NDArray[np.float32]:
    """What the router gives these choices."""
    return (1 / (3 + ids)).astype(np.float32)


def marks(records: int) -> NDArray[np.uint8]:
    return (1 + np.arange(records) % 200).astype(np.uint8)


def whole(records: int, nbytes: int) -> NDArray[np.uint8]:
    memory = np.zeros(records * nbytes + 256, np.uint8)
    return memory[-memory.ctypes.data % 256 :][: records * nbytes].reshape(records, nbytes)


@dataclass
class ManagedModel:
    """``check`` is given what a layer's kernel reads, where, and the marks that it has to find there."""

    device: Device
    managed: DeviceManaged
    layers: list[ManagedLayer]
    real_rows: torch.Tensor
    check: Callable[[str, Callable[[], Rows], NDArray[np.uint8]], None]

    def step(self, ids: Sequence[NDArray[np.int32]], padding: int = 0) -> None:
        """One forward pass, ``ids[layer]`` ``[rows, top_k]`` with so many rows of padding at the end."""
        narrow = len(ids[0]) <= self.managed.narrow_rows
        for layer, chosen in enumerate(ids):
            given, weights = torch.from_numpy(chosen.copy()), torch.from_numpy(weights_of(chosen))
            if narrow:
                view, rows = View.WINDOW, self.managed.launch(layer, given, weights, self.real_rows)
            else:
                view, rows = self.managed.launch_wide(layer, given, weights, self.real_rows), given
            self._run_kernel(layer, view, rows[: len(chosen) - padding], chosen[: len(chosen) - padding])

    def _run_kernel(self, layer: int, view: View, rows: torch.Tensor, chosen: NDArray[np.int32]) -> None:
        member = self.layers[layer]
        shown = member.memory.tensors(member.member, view)
        expert_map = self.managed.expert_map(layer, view)
        records = chosen.reshape(-1)
        if member.record_of is not None:
            records = member.record_of[records]
        owned = records >= 0

        def reads() -> Rows:
            mapped = rows.reshape(-1) if expert_map is None else expert_map[rows.reshape(-1).long()]
            assert all(0 <= row < len(shown[0]) for row in mapped[owned].tolist())
            assert (mapped[~owned] == -1).all()
            return [tuple(part[row] for part in shown) for row in mapped[owned].tolist()]

        self.check(f"layer {layer} {view.name}", reads, member.host.arrays[0][member.first + records[owned], 0])


def managed_model(
    device: Device,
    kernels: Kernels,
    check: Callable[[str, Callable[[], Rows], NDArray[np.uint8]], None],
    *,
    layers: int = 4,
    experts: int = 4,
    slots: int = 2,
    top_k: int = 1,
    most_rows: int = 8,
    gathered_rows: int = 4,
    record_of: NDArray[np.int32] | None = None,
) -> ManagedModel:
    plan = WindowPlan.of([experts] * layers, [slots] * layers, [part.nbytes for part in LAYOUT.components])
    memory = WindowMemory(device, LAYOUT, plan)
    host = HostRecords(device, layers * experts)
    members = [ManagedLayer(memory, layer, host, layer * experts, record_of) for layer in range(layers)]
    managed = DeviceManaged(device, members, kernels, top_k=top_k, most_rows=most_rows, gathered_rows=gathered_rows)
    real_rows = device.allocate(4).view(torch.int32)
    return ManagedModel(device, managed, members, real_rows, check)
