"""Which engines a comparison has, and which of them this machine has memory for. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..sizes import size_text

PLAIN = "plain vLLM"
ENGINE_BYTES = 2 << 30
"""Of an engine besides weights: its processes, and the KV cache that every arm gets."""
KV_CACHE_BYTES = 1 << 30
_DENSE_SHARE = 0.15
"""About the most of a MoE checkpoint that is not routed experts, where that is not known."""


class Arm(NamedTuple):
    """One engine."""

    name: str
    arguments: Mapping[str, Any]
    """Keyword arguments of vLLM's ``LLM`` that only this arm has."""
    share: float
    """Of the checkpoint's bytes, about how much it keeps in fast memory."""
    offloads: bool = True
    """With the plugin."""
    without_prediction: str = ""
    """The arm that differs from this one in prediction alone."""


def arms(shares: Mapping[str, float], gpu: bool, model_bytes: int | None) -> list[Arm]:
    """Plain vLLM, vLLM's own offloading where it has one, and ours with each budget, without and with prediction.

    Args:
        shares: each budget, and the share of the model that it is.
        gpu: whether engines run on a GPU, where vLLM can keep weights in host memory by itself.
        model_bytes: of the checkpoint; None if unknown.
    """
    found = [Arm(PLAIN, {"additional_config": {"moe_offload": False}}, 1.0, offloads=False)]
    for budget, share in shares.items():
        if gpu and model_bytes is not None:
            away = (1 - share) * (1 - _DENSE_SHARE) * model_bytes / 2**30
            own = {"additional_config": {"moe_offload": False}, "cpu_offload_gb": round(away, 2)}
            found.append(Arm(f"{budget}, vLLM's own offloading", own, share, offloads=False))
        for prediction, predictor in (("no prediction", "none"), ("prediction", "history")):
            settings = {"cache": budget, "predictor": predictor, "daemon": "off"}
            name, other = f"{budget}, {prediction}", f"{budget}, no prediction"
            found.append(Arm(name, {"additional_config": {"moe_offload": settings}}, share, True, other))
    return found


def memory_needed(arm: Arm, model_bytes: int) -> int:
    """About the bytes of fast memory that ``arm`` takes."""
    return round((arm.share + (1 - arm.share) * _DENSE_SHARE) * model_bytes) + ENGINE_BYTES


def left_out(found: Sequence[Arm], model_bytes: int | None, room: int) -> dict[str, str]:
    """Arms that do not fit into ``room`` bytes of fast memory, and why. Unknown models are tried."""
    if model_bytes is None:
        return {}
    needs = {arm.name: memory_needed(arm, model_bytes) for arm in found}
    return {
        name: f"does not fit: needs about {size_text(need)}, {size_text(room)} are free"
        for name, need in needs.items()
        if need > room
    }


def fit_together(found: Sequence[Arm], model_bytes: int | None, room: int) -> bool:
    """Whether all may stay alive while others take their turns."""
    if model_bytes is None:
        return False
    return sum(memory_needed(arm, model_bytes) for arm in found) <= room
