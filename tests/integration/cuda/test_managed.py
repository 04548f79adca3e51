"""Windows that a device manages, as layers and steps call them, and when the host manages instead."""

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
from tests.runtime.record_stores import ODD, RecordStore, build_store, layout
from tests.windows.reference_kernels import ReferenceKernels
from vllm_moe_offload.client.client import DaemonClient
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.device.base import RegistrationError
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.integration.cuda.managed import ManagedWindows, RegisteredRecords
from vllm_moe_offload.integration.method import OffloadedMoEMethod
from vllm_moe_offload.integration.placement import Budget, LoadedModel, ModelSlots
from vllm_moe_offload.integration.windows import _over_host_memory, records_to_manage
from vllm_moe_offload.pool import HostPool, local_pools
from vllm_moe_offload.runtime import Batch
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.windows.memory import View
from vllm_moe_offload.windows.plan import WindowPlan

LAYERS, EXPERTS, SLOTS, TOP_K, ROWS, CAPTURED = 3, 8, 4, 2, 16, 4
SHARED = layout(8192, 24)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[RecordStore]:
    made = build_store(tmp_path, [(SHARED, EXPERTS)] * LAYERS)
    yield made
    made.store.close()


@pytest.fixture
def device() -> VirtualDevice:
    return VirtualDevice(3, main_is_host=True)


def host_pools(made: RecordStore, slots: int = LAYERS * EXPERTS) -> dict[str, HostPool]:
    return local_pools(made.store, {made.store.layers[0].layout: slots}, "lfu", None)


class Windows:
    """Kernels compute what they read: the records of the rows that they are given."""

    def __init__(self, made: RecordStore, device: VirtualDevice):
        self.pools, self.stats = host_pools(made), Stats()
        (pool,) = set(self.pools.values())
        pool.load_all()
        plan = WindowPlan.of([EXPERTS] * LAYERS, [SLOTS] * LAYERS, [part.nbytes for part in SHARED.components])
        records = RegisteredRecords(device, made.store.layers, self.pools)
        self.managed = ManagedWindows(
            device,
            made.store.layers,
            {SHARED: plan},
            records,
            ReferenceKernels(device),
            self.stats,
            top_k=TOP_K,
            most_rows=ROWS,
            gathered_rows=CAPTURED,
        )

    def run(self, layer: int, ids: np.ndarray) -> tuple[View, list[torch.Tensor]]:
        view, rows = self.managed.serve(layer, torch.from_numpy(ids), torch.ones(ids.shape))
        place = self.managed.layers[layer]
        return view, [part[rows.long()] for part in place.memory.tensors(place.member, view)]

    def close(self) -> None:
        self.managed.close()
        for pool in self.pools.values():
            pool.close()


@pytest.fixture
def windows(made: RecordStore, device: VirtualDevice) -> Iterator[Windows]:
    windows = Windows(made, device)
    yield windows
    windows.close()


def test_kernels_read_the_records_chosen_and_the_device_says_what_it_has_done(
    made: RecordStore, windows: Windows, device: VirtualDevice
) -> None:
    draw, stats, wide, uses = np.random.default_rng(5), windows.stats, 0, 0
    for step in range(30):
        real = int(draw.choice([1, 2, 3, 4, 9, 16]))
        padding = 1 if real in (1, 3) else 0
        windows.managed.begin_step(Batch(real))
        for layer in range(LAYERS):
            ids = draw.permuted(np.tile(np.arange(EXPERTS), (real + padding, 1)), axis=1)[:, :TOP_K].astype(np.int32)
            view, parts = windows.run(layer, ids)
            assert (view == View.WINDOW) == (len(ids) <= SLOTS // TOP_K)
            uses += len(np.unique(ids[:real])) if real <= CAPTURED else 0
            for row, chosen in enumerate(ids[:real]):
                for choice, expert in enumerate(chosen):
                    for part, right in zip(parts, made.records[layer][expert], strict=True):
                        assert np.array_equal(part[row, choice].numpy(), right), (step, layer)
        wide += real > CAPTURED
        windows.managed.end_step()
    windows.managed.begin_step(Batch(0))
    assert 0 < stats.host_hits == stats.misses < stats.hits + stats.misses == uses
    whole = wide * LAYERS * EXPERTS
    assert wide and stats.copied_bytes == (stats.misses + whole) * SHARED.payload_bytes


def test_passes_outside_of_steps_bring_nothing_in(windows: Windows, device: VirtualDevice) -> None:
    """A warm-up of a graph runs the kernels; a larger pass, as of profiling, does not even copy."""
    for rows in (1, CAPTURED, ROWS):
        ids = np.tile(np.arange(TOP_K, dtype=np.int32), (rows, 1))
        for layer in range(LAYERS):
            _, parts = windows.run(layer, ids)
            assert not any(part.any() for part in parts)
    windows.managed.begin_step(Batch(1))
    for layer in range(LAYERS):
        windows.run(layer, np.arange(TOP_K, dtype=np.int32)[None])
    windows.managed.begin_step(Batch(0))
    stats = windows.stats
    assert stats.misses == LAYERS * TOP_K and stats.copied_bytes == LAYERS * TOP_K * SHARED.payload_bytes


def test_a_driver_that_refuses_part_of_host_memory_has_registered_nothing(
    tmp_path: Path, device: VirtualDevice
) -> None:
    made = build_store(tmp_path, [(SHARED, EXPERTS), (ODD, EXPERTS)])
    pools = local_pools(made.store, {SHARED: EXPERTS, ODD: EXPERTS}, "lfu", None)
    device.faults.registrations = len(SHARED.components)
    with pytest.raises(RegistrationError):
        RegisteredRecords(device, made.store.layers, pools)
    assert not device.registered
    for pool in set(pools.values()):
        pool.close()
    made.store.close()


def test_a_driver_that_gives_no_pinned_memory_either_ends_the_start_in_a_sentence(
    made: RecordStore, device: VirtualDevice
) -> None:
    pools = host_pools(made)
    plan = WindowPlan.of([EXPERTS] * LAYERS, [SLOTS] * LAYERS, [part.nbytes for part in SHARED.components])
    device.faults.registrations = 0
    refuse_again: Any = device.allocate_pinned
    device.allocate_pinned = lambda nbytes: setattr(device.faults, "registrations", 0) or refuse_again(nbytes)  # type: ignore[method-assign]
    behind = ModelSlots(pools, Stats(), False, None)
    with pytest.raises(ConfigError, match=r"told to refuse\): raise the limit on locked memory .* or switch moe-offl"):
        _over_host_memory(device, None, OffloadConfig(), model_of(made), {SHARED: plan}, behind, Budget(0), None)
    for pool in set(pools.values()):
        pool.close()


def model_of(made: RecordStore, top_k: tuple[int, ...] = (TOP_K,) * LAYERS) -> LoadedModel:
    layers: Any = {
        entry.name: (
            SimpleNamespace(_expert_map=None),
            SimpleNamespace(moe=SimpleNamespace(experts_per_token=choices)),
        )
        for entry, choices in zip(made.store.layers, top_k, strict=True)
    }
    return LoadedModel(None, "model", torch.nn.Module(), made.store, layers, False)


def refusal(device: VirtualDevice, models: list[LoadedModel], slots: ModelSlots, **settings: Any) -> str:
    """Why the device does not manage; nothing is left registered then."""
    records, why = records_to_manage(device, OffloadConfig(**settings), models, slots)
    assert (records is None) == bool(why) == (not device.registered)
    if records is not None:
        records.close()
        assert not device.registered
    for pool in slots.pools.values():
        pool.close()
    return why


def test_the_device_manages_where_host_memory_holds_every_expert(made: RecordStore, device: VirtualDevice) -> None:
    assert refusal(device, [model_of(made)], ModelSlots(host_pools(made), Stats(), True, None)) == ""


def test_the_host_manages_otherwise_and_it_is_said_why(made: RecordStore, device: VirtualDevice) -> None:
    few = ModelSlots(host_pools(made, LAYERS * EXPERTS - 1), Stats(), False, None)
    assert "host memory holds 23 of 24 experts" in refusal(device, [model_of(made)], few)
    for models, said in (
        ([model_of(made), model_of(made)], "a drafter has experts too"),
        ([model_of(made, (2, 2, 1))], "layers choose different numbers of experts"),
    ):
        assert said in refusal(device, models, ModelSlots(host_pools(made), Stats(), True, None))
    device.faults.registrations = 1
    refused = refusal(device, [model_of(made)], ModelSlots(host_pools(made), Stats(), True, None))
    assert "the GPU cannot read host memory where it lies: the virtual driver was told to refuse" in refused
    of_daemon = ModelSlots(host_pools(made), Stats(), True, object.__new__(DaemonClient))
    assert refusal(device, [model_of(made)], of_daemon) == "a daemon keeps the host's memory"


@pytest.mark.parametrize(
    ("settings", "by_itself"),
    [
        ({}, True),
        ({"trace": "routing.trace"}, True),
        ({"predictor": "history"}, True),
        ({"predictor": "none"}, True),
        ({"predictor": "gate"}, False),
        ({"predictor": "frequency"}, False),
    ],
)
def test_a_predictor_that_is_asked_between_layers_takes_the_host(
    made: RecordStore, device: VirtualDevice, settings: dict[str, Any], by_itself: bool
) -> None:
    why = refusal(device, [model_of(made)], ModelSlots(host_pools(made), Stats(), True, None), **settings)
    assert why == "" if by_itself else f"predictor = {settings['predictor']!r} is asked between layers" in why


@pytest.mark.parametrize(
    ("metadata", "mode", "brings_in"),
    [
        ({}, CUDAGraphMode.NONE, True),
        ({}, CUDAGraphMode.PIECEWISE, True),
        (None, CUDAGraphMode.NONE, False),
        (None, CUDAGraphMode.PIECEWISE, False),
        (None, CUDAGraphMode.FULL, True),  # what is captured now runs for requests later
    ],
)
def test_what_a_pass_is_for_decides_whether_a_layer_brings_experts_in(
    metadata: Any, mode: CUDAGraphMode, brings_in: bool
) -> None:
    shown: list[View] = []
    method: Any = object.__new__(OffloadedMoEMethod)
    method.faces = SimpleNamespace(show=shown.append)
    method.managed = lambda ids, _: (View.STAGE_1, ids + 3)
    method.managed_map = lambda _: None
    method.real = SimpleNamespace(apply=lambda layer, x, weights, ids, *_: ids)
    layer: Any = SimpleNamespace(_expert_map=None)
    ids = torch.arange(TOP_K)[None]
    context: Any = SimpleNamespace(attn_metadata=metadata, cudagraph_runtime_mode=mode)
    with override_forward_context(context):
        computed = method.compute(layer, torch.zeros(1, 4), torch.ones(1, TOP_K), ids)
    assert shown == [View.STAGE_1 if brings_in else View.WINDOW]
    assert torch.equal(computed, ids + 3 if brings_in else ids)
