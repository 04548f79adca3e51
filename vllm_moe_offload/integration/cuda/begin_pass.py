"""Where a forward pass is about to be launched, or replayed as a graph, in which no Python of a model runs.

By then the model runner has put the batch together: it says which rows belong to which request.
"""

from collections.abc import Callable
from typing import Any

from .. import seams


def install() -> None:
    seams.V1_FORWARD.wrap(_begin_pass_first)


def begin_pass(model_runner: Any) -> None:
    """Its batch has been put together. Without effect where its model is not offloaded, and outside of steps."""
    served = getattr(model_runner.get_model(), "moe_offload", None)
    if served is not None:
        served.begin_pass()


def _begin_pass_first(forward: Callable[..., Any]) -> Callable[..., Any]:
    def begin_and_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        begin_pass(self)
        return forward(self, *args, **kwargs)

    return begin_and_forward
