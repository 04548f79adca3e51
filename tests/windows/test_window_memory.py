"""Windows and stages in memory: what is written to a slot is what a kernel finds under its id, and nothing else is."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device import OutOfDeviceMemoryError
from vllm_moe_offload.store.layout import Component, RecordLayout
from vllm_moe_offload.windows.memory import View, WindowMemory
from vllm_moe_offload.windows.plan import ALIGNMENT, WindowPlan, is_shared

SIZES = (4096, 65_536 + 128, 100, 4, 0)
LAYOUT = RecordLayout(tuple(Component(f"part{size}", "uint8", (size,), size) for size in SIZES))


def window_memory(experts: list[int], slots: list[int]) -> WindowMemory:
    return WindowMemory(VirtualDevice(), LAYOUT, WindowPlan.of(experts, slots, SIZES))


@st.composite
def memories(draw: st.DrawFn) -> WindowMemory:
    experts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    return window_memory(experts, [draw(st.integers(1, count)) for count in experts])


@functools.cache
def record(number: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(number)
    return [torch.from_numpy(rng.integers(1, 256, size, dtype=np.uint8)) for size in SIZES]


def write(targets: tuple[torch.Tensor, ...], number: int) -> None:
    for target, part in zip(targets, record(number), strict=True):
        assert target.dtype == torch.uint8
        target.copy_(part)


def rows_of(memory: WindowMemory, member: int, view: View) -> list[torch.Tensor]:
    tensors = memory.tensors(member, view)
    for tensor, size in zip(tensors, SIZES, strict=True):
        assert tensor.shape == (memory.plan.experts[member], size)
        assert tensor.is_contiguous()
        assert size == 0 or tensor.data_ptr() % ALIGNMENT == 0
    return list(tensors)


def assert_is(rows: list[torch.Tensor], row: int, number: int) -> None:
    for tensor, part in zip(rows, record(number), strict=True):
        assert torch.equal(tensor[row], part)


@settings(max_examples=25, deadline=None)
@given(memories())
def test_every_slot_of_every_window_is_found_under_its_id(memory: WindowMemory) -> None:
    plan = memory.plan
    numbers = {(member, slot): 1000 * member + slot for member, count in enumerate(plan.slots) for slot in range(count)}
    for (member, slot), number in numbers.items():
        write(memory.slot(member, slot), number)
    for (member, slot), number in numbers.items():
        assert_is(rows_of(memory, member, View.WINDOW), plan.base(member) + slot, number)
    memory.clear()
    assert not any(tensor.any() for member in range(len(plan.slots)) for tensor in memory.tensors(member, View.WINDOW))


@settings(max_examples=25, deadline=None)
@given(memories())
def test_both_stages_hold_all_experts_of_any_layer_and_leave_windows_alone_that_are_not_lent(
    memory: WindowMemory,
) -> None:
    plan = memory.plan
    assert memory.views == tuple(View)[: 1 + len(plan.stages)]
    kept = [member for member in range(len(plan.slots)) if member not in plan.lent]
    for member in kept:
        write(memory.slot(member, plan.slots[member] - 1), member)
    for stage in range(len(plan.stages)):
        for expert in range(plan.stage_rows):
            write(memory.stage_row(stage, expert), 100 + 100 * stage + expert)
    for stage, view in enumerate(memory.views[1:]):
        for member, count in enumerate(plan.experts):
            rows = rows_of(memory, member, view)
            for expert in range(count):
                assert_is(rows, expert, 100 + 100 * stage + expert)
    for member in kept:
        assert_is(memory.tensors(member, View.WINDOW), plan.base(member) + plan.slots[member] - 1, member)


def test_small_components_of_a_lent_window_stay() -> None:
    """They have rows of their own: only the shared ones are overwritten."""
    memory = window_memory([4, 4, 4], [2, 2, 2])
    assert memory.plan.lent
    member = max(memory.plan.lent)
    write(memory.slot(member, 1), 7)
    for expert in range(4):
        write(memory.stage_row(0, expert), expert)
    row = memory.plan.base(member) + 1
    kept = [
        torch.equal(rows[row], part) for rows, part in zip(memory.tensors(member, View.WINDOW), record(7), strict=True)
    ]
    assert kept == [not is_shared(size) or size == 0 for size in SIZES]


@settings(max_examples=30, deadline=None)
@given(memories())
def test_as_much_memory_is_taken_as_the_plan_says(memory: WindowMemory) -> None:
    nbytes = memory.plan.nbytes(SIZES)
    WindowMemory(VirtualDevice(capacity=nbytes), LAYOUT, memory.plan)
    with pytest.raises(OutOfDeviceMemoryError):
        WindowMemory(VirtualDevice(capacity=nbytes - 1), LAYOUT, memory.plan)
