"""Gives a layer's kernel slots to read from instead of the weights it was built for."""

from typing import Any

import torch

from ..errors import StoreError, UnsupportedError
from ..pool.memory import SlotMemory
from .method import OffloadedMoEMethod
from .tensors import expert_tensors, place_in_pool, record_layout, remove


def attach_slots(
    layer: torch.nn.Module, method: OffloadedMoEMethod, memory: SlotMemory, first: int, count: int
) -> None:
    """Make slots ``first … first + count - 1`` the experts that ``method``'s kernel computes with.

    vLLM's own processing builds the kernel on one expert full of zeros: kernels take formats from weights, not
    values. Scales and biases that the kernel's configuration captured are then taken from the slots.

    Raises:
        StoreError: the records are not what this kernel reads.
        UnsupportedError: the kernel keeps a tensor of its own that slots cannot replace.
    """
    real = method.real
    template = _build_on_one_expert(layer, method)
    if record_layout(template) != memory.layout:
        raise StoreError(
            f"{layer.layer_name}: the store holds {memory.layout.components}, but the kernel reads "
            f"{record_layout(template).components}; remove it with 'vllm-moe-offload store prune --all'"
        )
    place_in_pool(layer, memory, first, count)
    real.moe_quant_config = real.get_fused_moe_quant_config(layer)
    real.moe_kernel.fused_experts.quant_config = real.moe_quant_config
    _refuse_captured(layer, real, {tensor.untyped_storage().data_ptr() for tensor in template.values()})


def _build_on_one_expert(layer: torch.nn.Module, method: OffloadedMoEMethod) -> dict[str, torch.Tensor]:
    remove(layer)
    experts = layer.local_num_experts
    layer.local_num_experts = 1
    try:
        method.create_real_weights(layer, num_experts=1)
        for name, tensor in expert_tensors(layer).items():
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            zeros.__class__ = tensor.__class__
            zeros.__dict__.update(tensor.__dict__)
            setattr(layer, name, zeros)
        method.real.process_weights_after_loading(layer)
        return expert_tensors(layer)
    finally:
        layer.local_num_experts = experts


def _refuse_captured(layer: torch.nn.Module, real: Any, template: set[int]) -> None:
    kernel = real.moe_kernel
    for holder in (real, kernel, kernel.fused_experts, kernel.prepare_finalize, real.moe_quant_config):
        for name, value in getattr(holder, "__dict__", {}).items():
            for inner_name, tensor in ((name, value), *getattr(value, "__dict__", {}).items()):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in template:
                    raise UnsupportedError(
                        f"moe-offload cannot serve {layer.layer_name}: {type(holder).__name__} keeps expert weights "
                        f"of its own in {inner_name}; use another --moe-backend, or switch moe-offload off"
                    )
