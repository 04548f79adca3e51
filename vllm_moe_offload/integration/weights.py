"""Refuses what would read or replace the weights of a model that offloads its experts.

The parameters of an offloaded layer are slots: whatever copies them out gets the experts that happen to be resident,
and whatever copies into them is undone by the next load from the store. Every refusal comes before anything is changed.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import UnsupportedError
from . import seams
from .engine_config import offload_config
from .method import OffloadedMoEMethod

_READS = "its parameters hold the experts that happen to be resident, not the model's; do this without moe-offload"
_REPLACES = "the experts are read from a store of the checkpoint's weights; start an engine with the new checkpoint"


def install() -> None:
    for seam in seams.WEIGHTS_READ:
        seam.wrap(_refusing(_READS))
    for seam in seams.WEIGHTS_REPLACED:
        seam.wrap(_refusing(_REPLACES))


def protect_weights(model: torch.nn.Module) -> None:
    """Refuse loading into and dumping of an offloaded ``model`` by code that calls the model itself, as trainers do.

    Hooks of a module run before any of its children is read or changed.
    """
    for module in model.modules():
        name = type(module).__name__
        if hasattr(module, "load_weights"):
            module.load_weights = _refused(f"{name}.load_weights", _REPLACES)
        if any(_is_offloaded(part) for part in module.modules()):
            module.register_state_dict_pre_hook(_refused(f"{name}.state_dict", _READS))
            module.register_load_state_dict_pre_hook(_refused(f"{name}.load_state_dict", _REPLACES))
        if _is_offloaded(module):
            for part, tensor in module.named_parameters(recurse=False):
                tensor.weight_loader = _refused(f"the weight loader of {name}.{part}", _REPLACES)


def _is_offloaded(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "quant_method", None), OffloadedMoEMethod)


def _refusing(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the wrapper of a function whose first argument is a worker, a model runner, or a model."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse_if_offloaded(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if _offloads(owner):
                _refuse(function.__qualname__, reason)
            return function(owner, *args, **kwargs)

        return refuse_if_offloaded

    return make


def _offloads(owner: Any) -> bool:
    """Workers are asked for their settings: all ranks must answer alike, also one whose layers have no experts."""
    if isinstance(owner, torch.nn.Module):
        return any(map(_is_offloaded, owner.modules()))
    return offload_config(owner.vllm_config) is not None


def _refused(name: str, reason: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse(name, reason)

    return refuse


def _refuse(name: str, reason: str) -> NoReturn:
    raise UnsupportedError(f"moe-offload does not work with {name}: {reason}")
