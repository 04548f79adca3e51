"""Loading one MoE layer: its weights wait as views of the mapped checkpoint until all are there.

Only then does the layer take memory, and only until its records are written. It must leave the same tensors that
vLLM's loading leaves: same parameters, same initial values where the checkpoint has nothing, same loaders, and of two
loads into one place the later.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import StoreError, UnsupportedError
from .coverage import Coverage, WrittenParts
from .tensors import NOT_EXPERT_WEIGHTS, expert_tensors

DIRECT_WRITERS = frozenset({"GptOssRoutedExperts"})
"""Layers whose model copies unquantized expert tensors into parameters without asking their loaders."""

_MOST_NAMED = 5
_WAY_OUT = (
    "vLLM itself would compute with whatever its memory held; complete the checkpoint (is a download unfinished?), "
    "or switch moe-offload off for this model"
)


class StreamedLayer:
    """The loads of one layer, kept back until they are complete.

    Args:
        layer: has parameters on the meta device, each with its ``weight_loader``.
        create: gives the layer parameters with memory, initialised as vLLM does.
        complete: called once, when every element of every parameter has been offered, unless the checkpoint may go
            without some. None: nothing is called; ``materialize`` is, when everything has been offered.
    """

    def __init__(self, layer: torch.nn.Module, create: Callable[[], None], complete: Callable[[], None] | None):
        self._layer = layer
        self._create = create
        self._loads: list[tuple[str, inspect.BoundArguments]] = []
        self._loaders: dict[str, Callable[..., Any]] = {}
        self._tensors = expert_tensors(layer)
        self._targets = {name: _target(name, parameter) for name, parameter in self._tensors.items()}
        """What loaders write into until all has come."""
        self._coverage = Coverage(self._tensors)
        self._optional = {name for name in self._tensors if name.endswith("_bias") and not layer.moe_config.has_bias}
        """What vLLM makes in case a checkpoint has it: zeros where it has not."""
        self._complete = None if self._optional else complete
        for name, parameter in self._tensors.items():
            self._loaders[name] = parameter.weight_loader
            parameter.weight_loader = self._keep_back(name)

    def materialize(self) -> None:
        """Take memory for the layer and do the loads that were kept back, in the order in which they came.

        Raises:
            UnsupportedError: a parameter was never offered to its loader, so its values went elsewhere.
            StoreError: the checkpoint lacks a tensor of an expert.
        """
        without = self._loaders.keys() - {name for name, _ in self._loads} - self._optional
        if without:
            raise UnsupportedError(
                f"moe-offload cannot load {self._layer.layer_name}: nothing came for {', '.join(sorted(without))} "
                f"through the loaders of {type(self._layer).__name__}; complete the checkpoint if it lacks these, or "
                "switch moe-offload off for this model"
            )
        refuse_missing(self._layer, self._missing())
        self._create()
        for name, arguments in self._loads:
            parameter = getattr(self._layer, name)
            arguments.arguments["param"] = parameter
            self._loaders[name](*arguments.args, **arguments.kwargs)
        self._loads.clear()
        # a model may have looked its parameters up before loading began
        for name, parameter in self._tensors.items():
            parameter.weight_loader = self._loaders[name]
        refuse_late_loads(self._layer, self._tensors)

    def _keep_back(self, name: str) -> Callable[..., Any]:
        loader = self._loaders[name]
        signature = inspect.signature(loader)

        def keep_back(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            arguments.arguments["param"] = self._targets[name]
            with WrittenParts(self._targets) as written:
                answer = loader(*arguments.args, **arguments.kwargs)
            if written.parts:
                self._loads.append((name, arguments))
                for target, block in written.parts:
                    self._coverage.add(target, block)
                if self._complete is not None and self._coverage.complete:
                    self._complete()
            return answer

        keep_back.supports_moe_loading = True  # type: ignore[attr-defined]
        return keep_back

    def _missing(self) -> list[str]:
        """What the checkpoint has for other experts, or for the other half of gate and up projection, but not here."""
        came: dict[str, dict[Any, set[str]]] = {name: {} for name in self._tensors}
        for name, arguments in self._loads:
            shard, expert = (arguments.arguments.get(key) for key in ("shard_id", "expert_id"))
            came[name].setdefault(expert, set()).add(str(shard))
        missing = []
        for name, by_expert in came.items():
            shards = set().union(*by_expert.values())
            for expert in map(self._global_number, self._coverage.lacking(name)):
                absent = sorted(shards - by_expert.get(expert, set())) or ["a part"]
                missing.append(f"{' and '.join(absent)} of expert {expert} ({name})")
            halves = {"w1", "w3"}
            if self._layer.moe_config.is_act_and_mul and self._coverage.partial(name) and len(shards & halves) == 1:
                missing.append(f"{(halves - shards).pop()} of every expert ({name})")
        return missing

    def _global_number(self, local: int) -> int:
        """The number by which the checkpoint knows an expert of this rank."""
        expert_map = self._layer._expert_map
        return local if expert_map is None else int((expert_map == local).nonzero()[0])


def _target(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """``parameter``, or where loaders look at what they have loaded before, one like it that has values."""
    if "input_scale" not in name:
        return parameter
    values = torch.nn.Parameter(torch.ones(parameter.shape, dtype=parameter.dtype, device="cpu"), requires_grad=False)
    values.__class__ = parameter.__class__
    values.__dict__.update(parameter.__dict__)
    return values


class DirectlyWrittenLayers:
    """Layers whose model writes into their parameters by itself; a context manager around their loading."""

    def __init__(self, layers: list[torch.nn.Module]):
        self._layers = [(layer, _loaded_per_expert(layer)) for layer in layers]
        everything = {
            f"{number}:{name}": tensor
            for number, (_, tensors) in enumerate(self._layers)
            for name, tensor in tensors.items()
        }
        self._written = WrittenParts(everything)

    def __enter__(self) -> None:
        if self._layers:
            self._written.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._layers:
            self._written.__exit__(*exception)

    def refuse_incomplete(self) -> None:
        """All has been loaded.

        Raises:
            StoreError: a tensor, or some expert's part of it, was never written.
        """
        for number, (layer, tensors) in enumerate(self._layers):
            coverage = Coverage(tensors)
            came = set()
            for key, block in self._written.parts:
                of, _, name = key.partition(":")
                if int(of) == number:
                    coverage.add(name, block)
                    came.add(name)
            missing = [f"{name} of every expert" for name in sorted(tensors.keys() - came)]
            for name in tensors:
                missing += [f"{name} of expert {expert}" for expert in coverage.lacking(name)]
            refuse_missing(layer, missing)


def _loaded_per_expert(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that come from the checkpoint with one part per expert; activations' scales may be computed."""
    return {
        name: tensor
        for name, tensor in layer.named_parameters(recurse=False)
        if name not in NOT_EXPERT_WEIGHTS
        and not name.endswith("input_scale")
        and tensor.dim()
        and tensor.shape[0] == layer.local_num_experts
    }


def refuse_missing(layer: torch.nn.Module, missing: list[str]) -> None:
    """Raises:
    StoreError: something is missing.
    """
    if missing:
        more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
        raise StoreError(
            f"cannot build a store: {layer.layer_name}: the checkpoint never brought "
            f"{', '.join(missing[:_MOST_NAMED])}{more}; {_WAY_OUT}"
        )


def refuse_late_loads(layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """From now on a load into ``tensors`` of the layer, whose records are written, is an error.

    vLLM would let it win over the one before. Only loads that do not wait until all have come can be too late.
    """
    for name, parameter in tensors.items():
        if hasattr(parameter, "weight_loader"):  # nothing is loaded into what only processing makes
            parameter.weight_loader = _refusing(layer, name, parameter.weight_loader, parameter)


def _refusing(
    layer: torch.nn.Module, name: str, loader: Callable[..., Any], parameter: torch.Tensor
) -> Callable[..., Any]:
    signature = inspect.signature(loader)
    target = _target(name, parameter)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        given["param"] = target
        with WrittenParts({name: target}) as written:
            answer = loader(*bound.args, **bound.kwargs)
        if written.parts:
            raise StoreError(
                f"cannot build a store: {layer.layer_name}: the checkpoint names {given.get('shard_id')} of expert "
                f"{given.get('expert_id')} ({name}) more than once, the last time when the layer was complete; remove "
                "the copy that is not wanted, or convert the checkpoint to safetensors, where the last one counts, as "
                "in vLLM"
            )
        return answer

    refuse.supports_moe_loading = True  # type: ignore[attr-defined]
    return refuse
