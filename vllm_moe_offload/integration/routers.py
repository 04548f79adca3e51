"""Finds the routers of a loaded model, for a predictor that asks them ahead of their turn.

It must never guess: a router it cannot find, or whose choices do not follow from the logits, is refused by name.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from ..errors import UnsupportedError
from ..predict.gate import SCORINGS, Array, Router

_PROBES = 32
_AGREEMENT = 0.95
"""Share of the choices for random inputs that must be predicted: the rest are ties in half precision."""


def layer_routers(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> list[Router]:
    """The routers of these layers' experts, in the same order.

    Raises:
        UnsupportedError: one cannot be found, reads something else than the experts do, or chooses in a way of its own.
    """
    runners = {
        id(module.routed_experts): (name, module)
        for name, module in model.named_modules()
        if isinstance(module, MoERunner)
    }
    routers = []
    for layer in layers:
        name, runner = runners[id(layer)]
        block = model.get_submodule(name.rpartition(".")[0])
        routers.append(_router(layer.layer_name, runner, _gate(layer.layer_name, block, runner)))
    return routers


def _gate(layer_name: str, block: torch.nn.Module, runner: Any) -> GateLinear:
    if runner.routed_input_transform is not None:
        raise _refusal(layer_name, "its experts read something else than its router does")
    if runner.gate is not None:
        return runner.gate
    found = [
        (owner, module) for owner in block.modules() for module in owner.children() if isinstance(module, GateLinear)
    ]
    if len(found) != 1:
        raise _refusal(layer_name, f"{type(block).__name__} has {len(found) or 'no'} linear routers")
    owner, gate = found[0]
    alone = [*owner.children()] == [gate] and not [*owner.parameters(recurse=False), *owner.buffers(recurse=False)]
    if owner is not block and not alone:
        raise _refusal(layer_name, f"{type(owner).__name__} does more than multiply by a matrix")
    return gate


def _router(layer_name: str, runner: Any, gate: GateLinear) -> Router:
    chooses = runner.router
    scoring, bias = chooses.scoring_func, chooses.e_score_correction_bias
    if gate.weight.device.type != "cpu":
        raise _refusal(layer_name, f"its weights are in the memory of {gate.weight.device}")
    if scoring not in SCORINGS or chooses._hash_indices_table is not None:
        raise _refusal(layer_name, f"{type(chooses).__name__} does not choose by the logits alone")
    grouped = chooses.use_grouped_topk
    router = Router(
        _logits_of(gate, runner.moe_config.in_dtype),
        scoring,
        None if bias is None else bias.detach().float().numpy(),
        chooses.num_expert_group if grouped else 1,
        chooses.topk_group if grouped else 1,
    )
    _check_against(layer_name, router, chooses, gate, runner.moe_config.in_dtype)
    return router


def _logits_of(gate: GateLinear, dtype: torch.dtype) -> Callable[[Array], Array]:
    width = gate.input_size

    def logits(hidden: Array) -> Array:
        with torch.inference_mode():
            answer = gate(torch.from_numpy(hidden[:, :width]).to(dtype))
        return (answer[0] if isinstance(answer, tuple) else answer).float().numpy()

    return logits


def _check_against(layer_name: str, router: Router, chooses: Any, gate: GateLinear, dtype: torch.dtype) -> None:
    """Compare with the real router on inputs at random: whatever vLLM may have added to it shows there."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((_PROBES, gate.input_size), dtype=np.float32)
    logits = torch.from_numpy(router.logits(hidden))
    _, chosen = chooses._compute_routing(torch.from_numpy(hidden).to(dtype), logits, None)
    margins = router.margins(hidden, chooses.top_k)
    agreed = float((np.take_along_axis(margins, chosen.long().numpy(), axis=1) >= 0).mean())
    if agreed < _AGREEMENT:
        raise _refusal(layer_name, f"only {agreed:.0%} of its choices follow from the logits as expected")


def _refusal(layer_name: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"predictor 'gate' cannot ask the router of {layer_name}: {reason}; use another predictor, like 'history'"
    )
