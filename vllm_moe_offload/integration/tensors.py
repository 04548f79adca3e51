"""A layer's tensors seen as records, and records seen as a layer's tensors."""

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..pool.memory import SlotMemory
from ..store.layout import Component, RecordLayout

NOT_EXPERT_WEIGHTS = frozenset(
    {
        "_expert_map",
        "expert_mask",
        "expert_global_to_physical",
        "expert_physical_to_global",
        "expert_local_to_global",
        "e_score_correction_bias",
        "hash_indices_table",
    }
)


def expert_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a layer that hold one part per expert, by name.

    Raises:
        UnsupportedError: a loaded tensor is shared by the experts, so that it has no place in a record.
    """
    experts = layer.local_num_experts
    found: dict[str, torch.Tensor] = {}
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    for name, tensor in (dict(layer.named_parameters(recurse=False)) | layer._buffers | plain).items():
        if name in NOT_EXPERT_WEIGHTS or tensor is None:
            continue
        if tensor.dim() == 0 or tensor.shape[0] != experts or name.endswith("input_scale"):
            raise UnsupportedError(
                f"moe-offload cannot serve {layer.layer_name}: {layer.quant_method.method_name} keeps {name} "
                f"{tuple(tensor.shape)} for all {experts} experts together; use another quantization, or switch "
                "moe-offload off"
            )
        found[name] = tensor
    return found


def record_layout(tensors: dict[str, torch.Tensor]) -> RecordLayout:
    """The layout of one expert's record."""
    return RecordLayout(
        tuple(
            Component(
                name,
                str(tensor.dtype).removeprefix("torch."),
                tuple(tensor.shape[1:]),
                tensor[0].numel() * tensor.element_size(),
            )
            for name, tensor in tensors.items()
        )
    )


def as_bytes(layer_name: str, tensors: dict[str, torch.Tensor]) -> list[NDArray[np.uint8]]:
    """Each tensor ``[experts, …]`` as uint8 ``[experts, nbytes]`` on the host, copied only from a device.

    Raises:
        UnsupportedError: a kernel reads a strided tensor, which slots could not reproduce.
    """
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise UnsupportedError(
                f"moe-offload cannot serve {layer_name}: its kernel reads {name} with strides {tensor.stride()}; "
                "use another quantization or --moe-backend, or switch moe-offload off"
            )
    return [tensor.detach().view(tensor.shape[0], -1).view(torch.uint8).cpu().numpy() for tensor in tensors.values()]


def place_in_pool(layer: torch.nn.Module, memory: SlotMemory, first: int, count: int) -> None:
    """Make slots ``first … first + count - 1`` the layer's expert tensors."""
    for component, tensor in zip(memory.layout.components, memory.tensors(), strict=True):
        dtype = getattr(torch, component.dtype)
        slots = tensor[first : first + count].view(dtype).view(count, *component.shape)
        _replace(layer, component.name, slots)


def move(layer: torch.nn.Module, device: torch.device) -> None:
    """Bring the layer's parameters to ``device``, the same objects with all that vLLM has noted on them."""
    for parameter in layer.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def remove(layer: torch.nn.Module) -> None:
    """Take a layer's expert tensors off it."""
    for name in expert_tensors(layer):
        delattr(layer, name)


def _replace(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    if name in layer._parameters:
        layer._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        setattr(layer, name, tensor)
