"""A layer's tensors seen as records, and records seen as a layer's tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnsupportedError
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
    for name, *_ in names_of_tensors(layer):
        tensor = getattr(layer, name)
        if not tensor.numel() and tensor.shape[:1] != (experts,):
            continue  # stands for what this checkpoint does not have
        if tensor.dim() == 0 or tensor.shape[0] != experts or name.endswith("input_scale"):
            raise UnsupportedError(
                f"moe-offload cannot serve {layer.layer_name}: {layer.quant_method.method_name} keeps {name} "
                f"{tuple(tensor.shape)} for all {experts} experts together; use another quantization, or switch "
                "moe-offload off"
            )
        found[name] = tensor
    return found


def names_of_tensors(layer: torch.nn.Module) -> list[list[str]]:
    """All names of each tensor that may hold experts' weights, the one it got first before its aliases.

    Some methods give a tensor a second name, by which the kernel is handed it.
    """
    names: dict[int, list[str]] = {}
    for name, value in (layer._parameters | layer._buffers | vars(layer)).items():
        if isinstance(value, torch.Tensor) and name not in NOT_EXPERT_WEIGHTS:
            names.setdefault(id(value), []).append(name)
    return list(names.values())


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


def as_weights(layout: RecordLayout, rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Bytes of experts, per component ``[rows, nbytes]``, as the tensors ``[rows, …]`` that a kernel reads."""
    return {
        component.name: tensor.view(getattr(torch, component.dtype)).view(len(tensor), *component.shape)
        for component, tensor in zip(layout.components, rows, strict=True)
    }


def move(layer: torch.nn.Module, device: torch.device) -> None:
    """Bring the layer's parameters to ``device``, the same objects with all that vLLM has noted on them."""
    for parameter in layer.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def remove(layer: torch.nn.Module) -> None:
    """Take a layer's expert tensors off it, whatever their names."""
    for names in names_of_tensors(layer):
        for name in names:
            delattr(layer, name)
