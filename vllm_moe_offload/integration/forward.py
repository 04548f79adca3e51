"""The opaque op that keeps torch.compile out of the runtime's Python."""

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerName, direct_register_custom_op


def _experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerName
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[layer_name.value].routed_experts
    return layer.quant_method.compute(layer, x, topk_weights, topk_ids)


def _experts_fake(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerName
) -> torch.Tensor:
    return torch.empty_like(x)


def register_op() -> None:
    """Make ``torch.ops.vllm.moe_offload_experts`` exist. Idempotent."""
    if not hasattr(torch.ops.vllm, "moe_offload_experts"):
        direct_register_custom_op("moe_offload_experts", _experts, fake_impl=_experts_fake)
