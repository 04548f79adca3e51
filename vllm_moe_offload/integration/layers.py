"""Takes over every MoE layer of the model being loaded, whatever class its experts have."""

from collections.abc import Callable
from typing import Any

from . import seams
from .loading import loading_offload
from .method import OffloadedMoEMethod
from .support import refuse_method


def install() -> None:
    seams.QUANT_METHOD.wrap(_take_over)


def _take_over(get_quant_method: Callable[..., Any]) -> Callable[..., Any]:
    def _get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = get_quant_method(self, prefix, quant_config, moe_config)
        offload = loading_offload()
        if offload is None:
            return method
        refuse_method(prefix, method)
        return OffloadedMoEMethod(method, offload.take_layer, offload.record)

    return _get_quant_method
