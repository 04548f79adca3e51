"""MoE layers of vLLM by themselves: quantization methods with kernels of any platform, over tensors of the host."""

from typing import Any

import torch

EXPERTS, HIDDEN, INTERMEDIATE = 8, 128, 128


class MoELayer(torch.nn.Module):
    """What quantization methods ask of ``RoutedExperts``."""

    def __init__(self, moe_config: Any, layer_name: str = "layer.0"):
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        super().__init__()
        self.moe_config, self.layer_name = moe_config, layer_name
        self.local_num_experts = self.global_num_experts = EXPERTS
        self.hidden_size, self.intermediate_size_per_partition = HIDDEN, INTERMEDIATE
        self.activation = MoEActivation.SILU
        self.params_dtype = moe_config.in_dtype
        self._expert_map = self.expert_map = None
        self.apply_router_weight_on_input = False
        self._loaded_expert_biases: set[str] = set()

    def _expert_routing_tables(self) -> None:
        return None


def moe_config(dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )

    return FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
        **more,
    )
