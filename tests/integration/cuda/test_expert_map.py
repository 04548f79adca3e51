"""Expert parallelism on GPUs: ids and maps lead kernels to the slots of this rank's experts, and to no others."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from tests.device.virtual import VirtualDevice
from tests.runtime.record_stores import RecordStore, build_store, layout
from tests.windows.reference_kernels import ReferenceSpeculativeKernels
from vllm_moe_offload.integration.cuda.expert_map import SlotMap, mapped_with
from vllm_moe_offload.integration.cuda.managed import ManagedWindows, RegisteredRecords
from vllm_moe_offload.integration.method import OffloadedMoEMethod
from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import Batch
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.windows.memory import View
from vllm_moe_offload.windows.plan import WindowPlan

LAYERS, HERE, SLOTS, TOP_K, ROWS, CAPTURED = 3, 8, 4, 2, 16, 4
SHARED = layout(8192, 24)
OF_ALL_RANKS = 3 * HERE
RECORD_OF = np.where(np.arange(OF_ALL_RANKS) % 3 == 1, np.arange(OF_ALL_RANKS) // 3, -1).astype(np.int32)
"""Every third expert is here."""


class Kernel:
    """Computes what vLLM's kernels find: for each choice the byte of the row that it is mapped to, or nothing."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def apply(self, layer: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        assert all(0 <= number < len(layer._expert_map) for number in ids.reshape(-1).tolist()), "an id has no entry"
        mapped = layer._expert_map[ids.long()]
        assert int(mapped.max()) < layer.local_num_experts, "a row beyond those that are shown"
        self.rows.append(mapped)
        return x


@pytest.fixture
def made(tmp_path: Path) -> Iterator[RecordStore]:
    made = build_store(tmp_path, [(SHARED, HERE)] * LAYERS)
    yield made
    made.store.close()


def expert_parallel_layer() -> Any:
    return SimpleNamespace(_expert_map=torch.from_numpy(RECORD_OF.copy()), local_num_experts=HERE)


def method_on_gpu(kernel: Kernel) -> Any:
    method: Any = object.__new__(OffloadedMoEMethod)
    method.real, method._within_op, method._slot_map = kernel, True, None
    method.faces = SimpleNamespace(show=lambda _: None)
    return method


def test_slots_are_their_own_rows_and_choices_of_other_ranks_are_skipped() -> None:
    layer, kernel = expert_parallel_layer(), Kernel()
    of_vllm = layer._expert_map
    slots = torch.tensor([[7, -1], [-1, -1], [0, 3]], dtype=torch.int32)
    method = method_on_gpu(kernel)
    for _ in range(2):
        method._compute_wave(layer, torch.zeros(3, 4), torch.ones(3, 2), slots)
    assert [rows.tolist() for rows in kernel.rows] == [slots.tolist()] * 2
    assert layer._expert_map is of_vllm


def test_the_map_of_vllm_is_back_after_a_kernel_that_failed() -> None:
    layer = expert_parallel_layer()
    of_vllm = layer._expert_map
    with pytest.raises(ZeroDivisionError), mapped_with(layer, SlotMap(of_vllm, HERE).expert_map):
        raise ZeroDivisionError
    assert layer._expert_map is of_vllm


def test_a_device_that_manages_shows_kernels_the_records_of_this_ranks_experts(made: RecordStore) -> None:
    """Narrow steps in windows, wider ones in stages, with ids of all ranks."""
    device = VirtualDevice(5, main_is_host=True)
    pools = local_pools(made.store, {SHARED: LAYERS * HERE}, "lfu", None)
    (pool,) = set(pools.values())
    pool.load_all()
    plan = WindowPlan.of([HERE] * LAYERS, [SLOTS] * LAYERS, [part.nbytes for part in SHARED.components])
    managed = ManagedWindows(
        device,
        made.store.layers,
        {SHARED: plan},
        RegisteredRecords(device, made.store.layers, pools),
        ReferenceSpeculativeKernels(device),
        Stats(),
        top_k=TOP_K,
        most_rows=ROWS,
        gathered_rows=CAPTURED,
        record_of=[RECORD_OF] * LAYERS,
    )
    layer, draw, views = expert_parallel_layer(), np.random.default_rng(3), set[View]()
    context: Any = SimpleNamespace(attn_metadata={}, cudagraph_runtime_mode=CUDAGraphMode.NONE)
    for rows in (1, 2, 1, CAPTURED, ROWS, 2, 1, ROWS, 1):
        managed.begin_step(Batch(rows))
        for number in range(LAYERS):
            kernel = Kernel()
            method = method_on_gpu(kernel)
            method.managed = lambda ids, weights, number=number: managed.serve(number, ids, weights)
            method.managed_map = lambda view, number=number: managed.expert_map(number, view)
            shown: list[View] = []
            method.faces = SimpleNamespace(show=shown.append)
            chosen = np.stack([draw.permutation(OF_ALL_RANKS)[:TOP_K] for _ in range(rows)]).astype(np.int32)
            with override_forward_context(context):
                method.compute(layer, torch.zeros(rows, 4), torch.ones(rows, TOP_K), torch.from_numpy(chosen))
            views |= set(shown)
            parts = managed.layers[number].memory.tensors(managed.layers[number].member, shown[-1])
            for row, expert in zip(kernel.rows[-1].reshape(-1).tolist(), chosen.reshape(-1).tolist(), strict=True):
                record = int(RECORD_OF[expert])
                assert (row >= 0) == (record >= 0), "every choice of this rank is computed, and no other"
                if record >= 0:
                    for part, right in zip(parts, made.records[number][record], strict=True):
                        assert np.array_equal(part[row].numpy(), right)
        managed.end_step()
    assert views == {View.WINDOW, View.STAGE_0}
    managed.close()
    pool.close()
