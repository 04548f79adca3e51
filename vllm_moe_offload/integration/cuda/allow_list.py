"""Which of vLLM's expert kernels for GPUs compute rightly over slots, and vLLM's own choice kept among them.

vLLM asks ``FusedMoEExperts.is_supported_config`` of one kernel class after the other and takes the first that answers
yes. While it chooses for a layer that is offloaded, classes that are not covered answer no.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Any, NamedTuple

from vllm.logger import init_logger
from vllm.platforms import current_platform

from ...errors import UnsupportedError
from .. import seams

logger = init_logger(__name__)


class Evidence(StrEnum):
    """How it is known that a kernel computes over slots what it computes over all experts."""

    GPU = "run on a GPU"
    INTERPRETER = "bits equal in Triton's interpreter"
    READ = "read in vLLM's sources"


class Coverage(NamedTuple):
    evidence: Evidence
    same_bits: bool
    """A row's result does not depend on where among the slots its experts are."""


COVERED = {
    "TritonExperts": Coverage(Evidence.INTERPRETER, same_bits=True),
    "TritonWNA16Experts": Coverage(Evidence.INTERPRETER, same_bits=True),
    "MarlinExperts": Coverage(Evidence.READ, same_bits=False),
}
"""Kernels by the names of their classes. Subclasses are not covered by their parents."""

OWN_LAYOUT = frozenset({"TritonExperts", "TritonWNA16Experts"})
"""Covered kernels that read weights as the checkpoint has them, whatever the GPU."""

_turned_down: ContextVar[list[str] | None] = ContextVar("moe_offload_turned_down", default=None)


def install() -> None:
    seams.SUPPORTED_KERNEL.wrap(_only_covered)


def is_covered(kernel: type) -> bool:
    """Whether a class of kernels may be shown slots. One that chooses between two while it runs: if both may."""
    inner = getattr(kernel, "get_clses", None)
    return kernel.__name__ in COVERED if inner is None else all(map(is_covered, inner()))


@contextmanager
def choosing_kernel(layer_name: str) -> Iterator[None]:
    """While vLLM chooses the kernel of a layer that is offloaded.

    Raises:
        UnsupportedError: vLLM finds no kernel that is covered; says which it would have taken otherwise.
    """
    if not current_platform.is_cuda_alike():
        yield
        return
    turned_down: list[str] = []
    token = _turned_down.set(turned_down)
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        if not turned_down:
            raise
        raise UnsupportedError(
            f"moe-offload cannot serve {layer_name}: {error} Of vLLM's GPU kernels it works with {', '.join(COVERED)}, "
            f"not with {', '.join(turned_down)}: choose another quantization or --moe-backend, or switch moe-offload "
            "off"
        ) from error
    finally:
        _turned_down.reset(token)
    if turned_down:
        logger.info_once(
            "vLLM computes experts with another kernel than %s, which cannot compute over slots",
            turned_down[0],
        )


def _only_covered(is_supported_config: Callable[..., tuple[bool, str | None]]) -> Callable[..., Any]:
    def answer(cls: type, *args: Any, **kwargs: Any) -> tuple[bool, str | None]:
        supported, reason = is_supported_config(cls, *args, **kwargs)
        turned_down = _turned_down.get()
        if not supported or turned_down is None or is_covered(cls):
            return supported, reason
        turned_down.append(cls.__name__)
        return False, f"moe-offload does not work with {cls.__name__}"

    return answer
