"""Loading one MoE layer: its weights wait as views of the mapped checkpoint until all are there.

Only then does the layer take memory, and only until its records are written. It must leave the same tensors that
vLLM's loading leaves: same parameters, same initial values where the checkpoint has nothing, same loaders.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.model_loader.reload.meta import get_numel_loaded

from ..errors import UnsupportedError
from .records import expert_tensors

DIRECT_WRITERS = frozenset({"GptOssRoutedExperts"})
"""Layers whose model copies unquantized expert tensors into parameters without asking their loaders."""


class StreamedLayer:
    """The loads of one layer, kept back until they are complete.

    Args:
        layer: has parameters on the meta device, each with its ``weight_loader``.
        create: gives the layer parameters with memory, initialised as vLLM does.
        complete: called once, when every element of every parameter has been offered.
    """

    def __init__(self, layer: torch.nn.Module, create: Callable[[], None], complete: Callable[[], None]):
        self._layer = layer
        self._create = create
        self._complete = complete
        self._loads: list[tuple[str, inspect.BoundArguments]] = []
        self._loaders: dict[str, Callable[..., Any]] = {}
        self._outstanding = 0
        for name, parameter in expert_tensors(layer).items():
            self._loaders[name] = parameter.weight_loader
            self._outstanding += getattr(parameter, "weight_loader_numel", parameter.numel())
            parameter.weight_loader = self._keep_back(name)

    def materialize(self) -> None:
        """Take memory for the layer and do the loads that were kept back.

        Raises:
            UnsupportedError: a parameter was never offered to its loader, so its values went elsewhere.
        """
        silent = self._loaders.keys() - {name for name, _ in self._loads}
        if silent:
            raise UnsupportedError(
                f"moe-offload cannot load {self._layer.layer_name}: nothing came for {', '.join(sorted(silent))} "
                f"through the loaders of {type(self._layer).__name__}; switch moe-offload off for this model"
            )
        self._create()
        for name, arguments in self._loads:
            parameter = getattr(self._layer, name)
            arguments.arguments["param"] = parameter
            self._loaders[name](*arguments.args, **arguments.kwargs)
        self._loads.clear()

    def _keep_back(self, name: str) -> Callable[..., Any]:
        loader = self._loaders[name]
        signature = inspect.signature(loader)

        def keep_back(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs)
            arguments.apply_defaults()
            elements, answer = get_numel_loaded(loader, arguments)
            if elements:
                self._loads.append((name, arguments))
                self._outstanding -= elements
                if self._outstanding <= 0:
                    self._complete()
            return answer

        keep_back.supports_moe_loading = True  # type: ignore[attr-defined]
        return keep_back
