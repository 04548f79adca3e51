"""Builds a layer's kernel without the layer's weights, and finds what it keeps of those it was built on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import StoreError, UnsupportedError
from ..store.layout import RecordLayout
from ..store.manifest import LayerTensor
from .method import OffloadedMoEMethod
from .tensors import LayerTensors, expert_tensors, names_of_tensors, record_layout, remove, stored, tensors_of

_VLLM_LAYERS = "vllm.model_executor.layers."


class Template(NamedTuple):
    """The kernel of a layer, built on a few experts that are zero: kernels take formats from weights, not values."""

    names: dict[str, list[str]]
    """By component of the layer's records, and by tensor of the layer: the names under which the layer has it."""
    storages: frozenset[int]
    """Addresses of the tensors that the kernel was built on."""
    per_expert: frozenset[str]
    """Paths of all tensors that the kernel or its configuration held with one part per expert."""
    holders: list[tuple[Any, str]]
    """Objects, and their attributes, that hold the configuration in which a kernel finds scales and biases."""


class Held(NamedTuple):
    """What an object that the kernel consists of holds."""

    path: str
    holder: Any
    attribute: str
    value: Any


def build_template(
    layer: torch.nn.Module, method: OffloadedMoEMethod, layout: RecordLayout, of_layer: Sequence[LayerTensor]
) -> Template:
    """Build ``method``'s kernel for records of ``layout``, by vLLM's own processing.

    Args:
        of_layer: what the store has for all experts of the layer together.

    Raises:
        StoreError: the records, or these tensors, are not what this kernel reads.
    """
    real = method.real
    _announce_biases(layer, layout)
    built = _build(layer, method, 3 if layer.local_num_experts == 2 else 2)
    tensors = built.of_experts
    held_in_store = *layout.components, *map(_shape_of, of_layer)
    read = *record_layout(tensors).components, *map(_shape_of, stored(layer.layer_name, built.of_layer))
    if held_in_store != read:
        raise StoreError(
            f"{layer.layer_name}: the store holds {held_in_store}, but the kernel reads {read}; remove it with "
            "'vllm-moe-offload store prune --all'"
        )
    experts = real.moe_kernel.fused_experts
    configs = [config for config in (real.moe_quant_config, experts.quant_config) if config is not None]
    held = list(held_by(real))
    holders = {(id(real), "moe_quant_config"): real, (id(experts), "quant_config"): experts}
    for one in held:
        if hasattr(one.holder, one.attribute) and any(one.value is config for config in configs):
            holders[id(one.holder), one.attribute] = one.holder
    count = len(next(iter(tensors.values())))
    return Template(
        names={names[0]: names for names in names_of_tensors(layer) if names[0] in tensors | built.of_layer},
        storages=frozenset(_storage(tensor) for part in built for tensor in part.values()),
        per_expert=frozenset(one.path for one in held if _is_tensor(one.value) and one.value.shape[:1] == (count,)),
        holders=[(holder, attribute) for (_, attribute), holder in holders.items()],
    )


def refuse_kept(layer: torch.nn.Module, real: Any, template: Template, slots: Mapping[str, torch.Tensor]) -> None:
    """Every tensor that the kernel reads per expert must lie in slots.

    One that it was built on would stay zero; one computed from slots would stay as the slots were then.

    Args:
        slots: the tensors that the layer has now, those of the whole layer among them.

    Raises:
        UnsupportedError: the kernel or its configuration keeps one of its own; names it.
    """
    in_slots = {_storage(tensor) for tensor in slots.values()}
    for path, holder, _, value in held_by(real):
        if not _is_tensor(value) or not value.numel() or _storage(value) in in_slots:
            continue
        if path in template.per_expert or _storage(value) in template.storages:
            raise UnsupportedError(
                f"moe-offload cannot serve {layer.layer_name}: {type(holder).__name__} keeps expert weights of its own "
                f"in {path}; use another --moe-backend, or switch moe-offload off"
            )


def held_by(real: Any) -> Iterator[Held]:
    """All that a quantization method, its kernel and what these consist of hold, each object once."""
    seen: set[int] = set()

    def walk(path: str, holder: Any) -> Iterator[Held]:
        for attribute, value in _parts(holder):
            place = f"{path}.{attribute}" if path else attribute
            yield Held(place, holder, attribute, value)
            if _consists_of_parts(value) and id(value) not in seen:
                seen.add(id(value))
                yield from walk(place, value)

    return walk("", real)


def _parts(holder: Any) -> list[tuple[str, Any]]:
    if isinstance(holder, dict):
        return [(str(key), value) for key, value in holder.items()]
    if isinstance(holder, list | tuple):
        return [(str(number), value) for number, value in enumerate(holder)]
    return list(vars(holder).items())


def _consists_of_parts(value: Any) -> bool:
    """Whether it is a container, or an object of a class of vLLM's layers or derived from one, other than a module."""
    if isinstance(value, dict | list | tuple):
        return True
    if isinstance(value, type | torch.nn.Module) or not hasattr(value, "__dict__"):
        return False
    return any(parent.__module__.startswith(_VLLM_LAYERS) for parent in type(value).__mro__)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shape_of(tensor: LayerTensor) -> tuple[str, str, tuple[int, ...]]:
    return tensor.name, tensor.dtype, tensor.shape


def _announce_biases(layer: torch.nn.Module, layout: RecordLayout) -> None:
    """Say which biases the checkpoint has, as vLLM's loaders do, where it was not read because its store was found.

    Formats that make biases in case a checkpoint has them remove those that were not announced.
    """
    if hasattr(layer, "_loaded_expert_biases"):
        layer._loaded_expert_biases |= {part.name for part in layout.components if part.name.endswith("_bias")}


def _build(layer: torch.nn.Module, method: OffloadedMoEMethod, count: int) -> LayerTensors:
    """Build on ``count`` experts: not one, as tensors of one element are not per expert, nor as many as there are."""
    remove(layer)
    experts = layer.local_num_experts
    layer.local_num_experts = count
    try:
        method.create_real_weights(layer, num_experts=count)
        for name, tensor in expert_tensors(layer).items():
            zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
            zeros.__class__ = tensor.__class__
            zeros.__dict__.update(tensor.__dict__)
            setattr(layer, name, zeros)
        method.real.process_weights_after_loading(layer)
        return tensors_of(layer)
    finally:
        layer.local_num_experts = experts
