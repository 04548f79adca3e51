"""Heads in Triton's interpreter: the predictor's probabilities, and ``WindowTables.speculate``."""

import numpy as np
import pytest
import torch

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.predict.heads import HeadsStep, HeadWeights, KnownBefore
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.trace.recorder import routing_shares
from vllm_moe_offload.windows import speculative_kernels
from vllm_moe_offload.windows.device_tables import DeviceTables, Ring, Window
from vllm_moe_offload.windows.tables import ABSENT, WindowTables


@pytest.mark.parametrize(("experts", "slots"), [(24, 6), (8, 1), (40, 40)])
def test_a_speculative_load_is_that_of_the_policy(experts: int, slots: int) -> None:
    rng = np.random.default_rng(experts)
    device = VirtualDevice(0)
    record_of = np.where(np.arange(experts) % 5 == 4, -1, np.arange(experts)).astype(np.int32)
    layer = DeviceTables(device, [Window(experts, slots, 3, False, record_of)]).layers[0]
    ring = Ring(device, 2, 1, 8)
    policy = WindowTables(experts, slots, record_of >= 0)
    misses, given = torch.zeros(4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    speculated = 0
    for step in range(1, 500, 8):
        policy.serve(rng.integers(0, experts, (1, 1 + slots // 4)), step)
        layer.row_of.copy_(torch.from_numpy(np.where(policy.slot_of >= 0, policy.slot_of + 3, ABSENT)))
        for table, values in ((layer.heat, policy.heat), (layer.epoch, policy.epoch)):
            table.copy_(torch.from_numpy(values))
        layer.expert_of.copy_(torch.from_numpy(policy.expert_of))
        n_real = int(rng.integers(4))
        ring.step[0] = step
        given[:] = torch.tensor([n_real, step])
        scores = rng.normal(-1, 1, (3, experts)).astype(np.float32).round(1)
        speculative_kernels.select_speculative[(1,)](
            *(given, torch.from_numpy(scores), 3, 0.8, layer.tables, layer.tables.shape[1], 3, experts, slots),
            *(misses, ring.header),
            P=64,
        )
        best = scores[:n_real].max(axis=0, initial=-np.inf)
        expected = policy.speculate(best, step, np.float32(0.8))
        policy.check_integrity()
        found = misses[1 : 1 + 3 * int(misses[0])].reshape(-1, 3).tolist()
        assert found == [[record_of[expert], slot, -1] for expert, slot in expected]
        assert layer.expert_of.tolist() == policy.expert_of.tolist()
        assert layer.row_of.tolist() == np.where(policy.slot_of >= 0, policy.slot_of + 3, ABSENT).tolist()
        speculated += len(expected)
    assert speculated > 5 or slots in (1, experts)


def test_heads_give_the_predictor_s_probabilities() -> None:
    rng = np.random.default_rng(0)
    layers, experts, rows, top_k, width, hidden = 3, 12, 2, 3, 40, 24
    parameters = Parameters.random(NetworkSize(layers, experts, 8, width, hidden), rng)
    weights = HeadWeights(parameters)
    state = rng.standard_normal((rows, width), np.float32)
    none = np.full((rows, layers, top_k), -1), np.zeros((rows, layers, top_k), np.float32)
    frequency = rng.random((rows, layers, experts), np.float32)
    known = KnownBefore(*none, *none, frequency)
    predictor = HeadsStep(weights, state.copy(), known)
    before = torch.from_numpy(state)
    ring, given = Ring(VirtualDevice(0), 2, 1, 8), torch.tensor([rows, 1])
    for layer in range(layers - 1):
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(rows)])
        shares = rng.random((rows, top_k), np.float32)
        predictor.observe(layer, ids, routing_shares(shares))
        after, scores = torch.zeros_like(before), torch.zeros(rows, experts)
        speculative_kernels.observe[(rows,)](
            *(given, torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(shares), top_k),
            *(torch.from_numpy(weights.maps[layer]), before, after, width, ring.header),
            S=64,
        )
        speculative_kernels.evaluate[(rows,)](
            *(given, after, torch.from_numpy(weights.hidden_before(layer + 1, known))),
            *(torch.from_numpy(part[layer + 1]) for part in (weights.heads, weights.outputs, weights.output_bias)),
            *(scores, experts, width, hidden, ring.header),
            P=16,
            BLOCK=16,
        )
        assert np.allclose(torch.sigmoid(scores).numpy(), predictor.predict(layer + 1), atol=1e-5)
        before = after


def test_rows_of_another_step_are_none() -> None:
    ring, given = Ring(VirtualDevice(0), 2, 1, 8), torch.tensor([1, 7])
    layer = DeviceTables(VirtualDevice(0), [Window(4, 2, 0, False, None)]).layers[0]
    for step, speculated in ((6, 0), (7, 1), (8, 0)):
        ring.step[0] = step
        misses = torch.full((4,), -9, dtype=torch.int32)
        speculative_kernels.select_speculative[(1,)](
            *(given, torch.ones(1, 4), 1, 0.5, layer.tables, layer.tables.shape[1], 0, 4, 2, misses, ring.header), P=16
        )
        after = torch.full((1, 8), 5.0)
        speculative_kernels.observe[(1,)](
            *(given, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1), 1, torch.ones(4, 16)),
            *(torch.zeros(1, 8), after, 8, ring.header),
            S=8,
        )
        assert int(misses[0]) == speculated
        assert after.tolist() == [[2.0 if speculated else 5.0] * 8]
