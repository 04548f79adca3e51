"""What a layer's manager costs on the device, how fast what is missing comes, and whether it decides as it should.

    python benchmarks/gpu/manager.py --out FILE

No vLLM, no model: the kernels that device-managed windows use, captured in a graph of several layers, over records of
random bytes. `every use hit` asks for the same experts in every step; `every use misses` for others than the step
before, in windows that hold one step's. Then steps of random ids are compared with ``windows.tables``, and slots with
the records that belong there.
"""

import argparse
import json
import mmap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_moe_offload.device import Device
from vllm_moe_offload.device.cuda import CudaDevice
from vllm_moe_offload.device.registered import RegisteredMemory
from vllm_moe_offload.store.layout import Component, RecordLayout
from vllm_moe_offload.windows.device_managed import DeviceManaged, ManagedLayer
from vllm_moe_offload.windows.launches import TritonKernels
from vllm_moe_offload.windows.memory import WindowMemory
from vllm_moe_offload.windows.plan import WindowPlan
from vllm_moe_offload.windows.tables import WindowTables

_WARM_STEPS = 3


class Case(NamedTuple):
    """Layers alike. ``record_bytes`` is one expert's."""

    name: str
    layers: int
    experts: int
    slots: int
    top_k: int
    record_bytes: int


CASES = (
    Case("32 experts of 13.2 MB, top-4", 4, 32, 8, 4, 13_219_840),
    Case("128 experts of 9.4 MB, top-8", 4, 128, 32, 8, 9_437_184),
    Case("128 experts of 4.7 MB, top-8", 4, 128, 32, 8, 4_718_592),
    Case("256 experts of 4.7 MB, top-8", 2, 256, 64, 8, 4_718_592),
)


class Records:
    """Records of random bytes in host memory that the device reads."""

    def __init__(self, device: Device, count: int, nbytes: int):
        memory = np.frombuffer(mmap.mmap(-1, count * nbytes), np.uint8).reshape(count, nbytes)
        memory[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
        memory[:, :8] = np.arange(count, dtype=np.int64).view(np.uint8).reshape(count, 8)
        self.arrays: Sequence[NDArray[np.uint8]] = (memory,)
        self._registered = RegisteredMemory(device, self.arrays)

    def address(self, component: int) -> int:
        return self._registered.address(component)

    def runs(self, first: int, count: int) -> Sequence[range]:
        return (range(first, first + count),)

    def close(self) -> None:
        self._registered.close()


class Model:
    """The windows of one case, empty, and a step through all layers."""

    def __init__(self, device: Device, case: Case):
        layout = RecordLayout((Component("weight", "uint8", (case.record_bytes,), case.record_bytes),))
        plan = WindowPlan.of([case.experts] * case.layers, [case.slots] * case.layers, [case.record_bytes])
        self.case, self.device = case, device
        self.memory = WindowMemory(device, layout, plan)
        self.records = Records(device, case.layers * case.experts, case.record_bytes)
        layers = [ManagedLayer(self.memory, n, self.records, n * case.experts) for n in range(case.layers)]
        kernels = TritonKernels(case.experts)
        self.managed = DeviceManaged(device, layers, kernels, top_k=case.top_k, most_rows=1, gathered_rows=1)
        self.real_rows = device.allocate(4).view(torch.int32)
        self.real_rows.fill_(1)
        self.ids = device.allocate(4 * case.layers * case.top_k).view(torch.int32).view(case.layers, 1, case.top_k)
        self.weights = device.allocate(4 * case.top_k).view(torch.float32).view(1, case.top_k)
        self._replay: Callable[[], None] = self._launch

    def capture(self) -> None:
        """From now on a step is a graph, where there are graphs."""
        if torch.cuda.is_available():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._launch()
            self._replay = graph.replay

    def step(self, ids: NDArray[np.integer]) -> float:
        """One step with ``ids`` ``[layers, top_k]``; its seconds on the device."""
        self.ids.copy_(torch.from_numpy(ids.astype(np.int32)).view_as(self.ids))
        self.device.synchronize(self.device.record(self.device.main))
        began = time.perf_counter()
        self._replay()
        self.device.synchronize(self.device.record(self.device.main))
        seconds = time.perf_counter() - began
        self.managed.read_back(1)
        return seconds

    def close(self) -> None:
        self.device.synchronize(self.device.record(self.device.main))
        self.records.close()

    def _launch(self) -> None:
        for layer in range(self.case.layers):
            self.managed.launch(layer, self.ids[layer], self.weights, self.real_rows)


def measure(device: Device, case: Case, steps: int) -> dict[str, Any]:
    """Microseconds of a layer, bytes per second of loads, and whether ``steps`` random steps were decided as wanted."""
    model = Model(device, case)
    same = np.tile(np.arange(case.top_k), (case.layers, 1))
    for _ in range(_WARM_STEPS):
        model.step(same)
    model.capture()
    model.step(same)
    hit = median(model.step(same) for _ in range(steps))
    model.close()
    missing = Model(device, case._replace(slots=case.top_k))
    for number in range(_WARM_STEPS):
        missing.step(same + case.top_k * (number % 2))
    missing.capture()
    taken = median(missing.step(same + case.top_k * (number % 2)) for number in range(steps))
    missing.close()
    moved = case.layers * case.top_k * case.record_bytes
    return case._asdict() | {
        "hit_us_per_layer": 1e6 * hit / case.layers,
        "miss_us_per_layer": 1e6 * taken / case.layers,
        "bytes_per_second": moved / max(taken - hit, 1e-9),
        "differences": differences(device, case, steps),
    }


def differences(device: Device, case: Case, steps: int) -> int:
    """Layers whose windows are not what the policy makes of the same random ids, or hold other bytes than wanted."""
    model = Model(device, case)
    rng = np.random.default_rng(3)
    policy = [WindowTables(case.experts, case.slots) for _ in range(case.layers)]
    popularity = rng.dirichlet(np.full(case.experts, 0.3), case.layers) + 1e-9
    for number in range(1, steps + 1):
        popular = popularity / popularity.sum(axis=1, keepdims=True)
        ids = np.stack([rng.choice(case.experts, case.top_k, replace=False, p=row) for row in popular])
        model.step(ids)
        for layer, tables in enumerate(policy):
            tables.serve(ids[layer][None], number)
        if number == _WARM_STEPS:
            model.capture()
    wrong = sum(not _is_as_wanted(model, layer, tables) for layer, tables in enumerate(policy))
    model.close()
    return wrong


def _is_as_wanted(model: Model, layer: int, policy: WindowTables) -> bool:
    tables = model.managed.tables.layers[layer]
    if not np.array_equal(tables.expert_of.cpu().numpy(), policy.expert_of):
        return False
    (records,) = model.records.arrays
    for slot, expert in enumerate(policy.expert_of.tolist()):
        if expert >= 0:
            (arrived,) = model.memory.slot(layer, slot)
            if not np.array_equal(arrived.cpu().numpy(), records[layer * model.case.experts + expert]):
                return False
    return np.array_equal(tables.heat.cpu().numpy(), policy.heat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    device = CudaDevice()
    results = []
    for case in CASES:
        found = measure(device, case, options.steps)
        results.append(found)
        options.out.write_text(json.dumps(results, indent=1))
        print(
            f"{case.name}: a layer whose experts are all there {found['hit_us_per_layer']:.1f} us (wanted: <= 6), "
            f"one that loads all {found['miss_us_per_layer']:.0f} us, {found['bytes_per_second'] / 1e9:.1f} GB/s; "
            f"layers decided differently from the policy: {found['differences']} of {case.layers} (wanted: 0)",
            flush=True,
        )


if __name__ == "__main__":
    main()
