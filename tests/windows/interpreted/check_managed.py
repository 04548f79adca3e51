"""``manage``, ``stage``, ``note`` and ``gather`` in Triton's interpreter decide and copy as ``WindowTables`` does.

The interpreter runs a program's threads as one, so it cannot show a missing barrier between them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.windows.interpreted.windowed import MOST_IDS, WindowedLayer, weights_of
from vllm_moe_offload.trace.trace_file import read_trace

TRACE = Path(__file__).parents[3] / "examples" / "traces" / "gpt-oss-20b-small.npz"
PARTS = [16 * 37, 8 * 5, 3]
"""Bytes of components: copied 16, 8 and 1 a lane."""
LARGE = [20_000, 16]
"""More than one block for a program."""


def routed(rng: np.random.Generator, experts: int, most: int, rows: int, top_k: int) -> NDArray[np.int32]:
    """At most ``most`` distinct experts, some choices missing."""
    some = rng.choice(experts, min(int(rng.integers(1, most + 1)), experts), replace=False)
    ids = rng.choice(some, (rows, top_k)).astype(np.int32)
    ids[rng.random(ids.shape) < 0.04] = -1
    return ids


@pytest.mark.parametrize(
    ("experts", "slots", "top_k", "rows", "steps", "base", "parts"),
    [
        (32, 8, 4, 2, 60, 0, PARTS),
        (60, 15, 4, 3, 30, 45, PARTS),
        (8, 2, 2, 1, 30, 6, PARTS),
        (16, 16, 4, 4, 20, 0, LARGE),
        (160, 70, 8, 12, 16, 20, [16]),
    ],
)
def test_random_steps(experts: int, slots: int, top_k: int, rows: int, steps: int, base: int, parts: list[int]) -> None:
    rng = np.random.default_rng(experts)
    layer = WindowedLayer(experts, slots, parts, base=base)
    step = 1
    for _ in range(steps):
        some_rows = int(rng.integers(1, rows + 1))
        real = int(rng.integers(0, some_rows + 1))
        ids = routed(rng, experts, slots, some_rows, top_k)
        ids[real:] = rng.integers(0, experts, ids[real:].shape)
        assert ids.size <= MOST_IDS
        layer.serve(ids, step, real, (torch.int32, torch.int64)[step % 2])
        step += int(rng.choice([0, 1, 1, 1, 7, 300]))


def test_recorded_steps() -> None:
    trace = read_trace(TRACE)
    layer = WindowedLayer(trace.num_experts, 8, [16])
    for step, choices in enumerate(trace.experts[:60, 12], start=1):
        layer.serve(choices[None].astype(np.int32), step, 1)


def test_a_step_that_does_not_fit_is_reported_and_changes_nothing() -> None:
    layer = WindowedLayer(16, 4, PARTS)
    layer.serve(np.array([[1, 2], [3, 4]]), 1, 2)
    layer.serve(np.array([[1, 5], [6, 7], [8, 9]]), 2, 3)
    layer.serve(np.array([[1, 5], [6, 7]]), 3, 2)


def test_a_rank_loads_only_what_it_owns() -> None:
    rng = np.random.default_rng(5)
    record_of = np.full(24, -1, np.int32)
    record_of[1::3] = np.arange(8)
    layer = WindowedLayer(24, 4, PARTS, base=3, record_of=record_of)
    for step in range(1, 30):
        ids = rng.choice(24, (2, 6)).astype(np.int32)
        if len(set(ids.ravel().tolist()) & set(range(1, 24, 3))) <= 4:
            layer.serve(ids, step, 2)


@pytest.mark.parametrize("is_lent", [False, True])
def test_wide_steps_between_narrow_ones(is_lent: bool) -> None:
    rng = np.random.default_rng(3)
    layer = WindowedLayer(24, 6, PARTS, base=2, is_lent=is_lent)
    for step in range(1, 13):
        if step % 3:
            layer.serve(routed(rng, 24, 6, 2, 3), step, 2)
        else:
            real = int(rng.integers(0, 9))
            layer.serve_wide(routed(rng, 24, 24, 8, 4), step, real)
            if is_lent:
                layer.forget()


def test_speculative_loads_between_steps_are_counted() -> None:
    rng = np.random.default_rng(11)
    layer = WindowedLayer(24, 14, PARTS, base=2, is_lent=True)
    started, outcomes = 0, np.zeros(3, np.int64)
    for step in range(1, 60):
        for _ in range(int(rng.integers(3))):
            started += layer.speculate(rng.normal(-1, 1, 24).astype(np.float32), step)
        layer.serve(routed(rng, 24, 4, 2, 3), step, 2)
        outcomes += layer.ring.notes[step % len(layer.ring.notes), layer.layer.number, 6:].numpy()
        if step % 20 == 0:
            layer.forget()
    pending = np.count_nonzero(layer.policy.mark)
    assert outcomes[0] == started == outcomes[1:].sum() + pending
    assert (outcomes[1:] > 5).all()


def test_a_rank_stages_what_it_owns() -> None:
    record_of = np.where(np.arange(24) >= 12, np.arange(24) - 12, -1).astype(np.int32)
    layer = WindowedLayer(24, 6, PARTS, record_of=record_of)
    layer.serve(np.array([[12, 3, 20, 21]]), 1, 1)
    layer.serve_wide(np.arange(24, dtype=np.int32).reshape(6, 4), 2, 6)


def test_noted_ids_are_in_the_ring() -> None:
    layer = WindowedLayer(16, 4, [16])
    ids = np.arange(12, dtype=np.int32).reshape(6, 2)
    layer.real_rows[0], layer.ring.step[0] = 4, 5
    weights = weights_of(ids)
    layer.kernels.note(layer.layer, torch.from_numpy(ids), weights, layer.real_rows, layer.ring)
    layer.compare_ring(ids, weights, 5, [8, 0, 0, 0, 0, 0, 0, 0])
