"""What a layer was routed to, as the host sees it, and slots as a kernel does."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from vllm_moe_offload.integration.routing import (  # noqa: E402 - needs torch
    experts_on_host,
    floats_on_host,
    on_device,
    own_experts,
)


def test_experts_are_the_models_or_those_of_this_worker() -> None:
    topk_ids = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    assert experts_on_host(topk_ids).tolist() == [[3, 1], [0, 2]]
    experts = experts_on_host(topk_ids)
    assert own_experts(experts, None).tolist() == [[3, 1], [0, 2]]
    assert own_experts(experts, torch.tensor([-1, 0, -1, 1])).tolist() == [[1, 0], [-1, -1]]


def test_on_the_cpu_nothing_is_copied() -> None:
    topk_ids = torch.tensor([[3, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.75, 0.25]])
    assert experts_on_host(topk_ids).ctypes.data == topk_ids.data_ptr()
    assert floats_on_host(weights).ctypes.data == weights.data_ptr()
    slots = np.array([[7, 5]], dtype=np.int32)
    assert on_device(slots, topk_ids).data_ptr() == slots.ctypes.data


def test_weights_are_single_precision_whatever_the_model_computes_in() -> None:
    weights = floats_on_host(torch.tensor([[0.5, 0.25]], dtype=torch.bfloat16))
    assert weights.dtype == np.float32 and weights.tolist() == [[0.5, 0.25]]
