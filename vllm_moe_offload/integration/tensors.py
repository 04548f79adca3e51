"""A layer's tensors seen as records, and records seen as a layer's tensors."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ..store.layout import Component, RecordLayout
from ..store.manifest import LayerTensor

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


MOST_LAYER_BYTES = 4096
"""Of a tensor that a layer has for all its experts together: scales, which take a few bytes."""


class LayerTensors(NamedTuple):
    """The tensors of a layer by their first names."""

    of_experts: dict[str, torch.Tensor]
    """``[experts, …]``: one part per expert."""
    of_layer: dict[str, torch.Tensor]
    """Small ones that belong to no expert, such as a scale of activations."""


def tensors_of(layer: torch.nn.Module) -> LayerTensors:
    """All tensors of a layer that may hold weights, except those that stand for what its checkpoint does not have.

    Raises:
        UnsupportedError: the experts share a tensor that is too large for a scale.
    """
    experts = layer.local_num_experts
    found = LayerTensors({}, {})
    for name, *_ in names_of_tensors(layer):
        tensor = getattr(layer, name)
        if tensor.shape[:1] == (experts,):
            found.of_experts[name] = tensor
        elif tensor.nbytes > MOST_LAYER_BYTES:
            _refuse_shared(layer, name, tensor)
        elif tensor.numel():
            found.of_layer[name] = tensor
    return found


def expert_tensors(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a layer into which a checkpoint is loaded, each with one part per expert, by name.

    Raises:
        UnsupportedError: the experts share one.
    """
    of_experts, of_layer = tensors_of(layer)
    for name, tensor in of_layer.items():
        _refuse_shared(layer, name, tensor)
    return of_experts


def _refuse_shared(layer: torch.nn.Module, name: str, tensor: torch.Tensor) -> NoReturn:
    raise UnsupportedError(
        f"moe-offload cannot serve {layer.layer_name}: {layer.quant_method.method_name} keeps {name} "
        f"{tuple(tensor.shape)} for all {layer.local_num_experts} experts together; use another quantization, or "
        "switch moe-offload off"
    )


def stored(layer_name: str, of_layer: Mapping[str, torch.Tensor]) -> list[LayerTensor]:
    """Tensors of a layer as its store keeps them.

    Raises:
        UnsupportedError: a kernel reads a strided one.
    """
    parts = []
    for name, tensor in of_layer.items():
        _refuse_strided(layer_name, name, tensor)
        content = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
        parts.append(LayerTensor(name, _dtype_name(tensor), tuple(tensor.shape), content))
    return parts


def restored(parts: Sequence[LayerTensor]) -> dict[str, torch.Tensor]:
    """Tensors of a layer out of its store, on the host."""
    return {
        part.name: torch.frombuffer(bytearray(part.data), dtype=getattr(torch, part.dtype)).view(part.shape)
        for part in parts
    }


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
                _dtype_name(tensor),
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
        _refuse_strided(layer_name, name, tensor)
    return [
        tensor.detach().view(len(tensor), tensor[0].numel()).view(torch.uint8).cpu().numpy()
        for tensor in tensors.values()
    ]


def _refuse_strided(layer_name: str, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise UnsupportedError(
            f"moe-offload cannot serve {layer_name}: its kernel reads {name} with strides {tensor.stride()}; "
            "use another quantization or --moe-backend, or switch moe-offload off"
        )


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


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
