"""CUDA graphs around experts that the host manages: graphs end before each MoE layer and begin behind it.

A captured graph reads its inputs where they lay when it was captured. What an operation between two graphs returns must
therefore lie in the same place each time, as vLLM's attention has it, whose outputs belong to the caller. With experts
managed by the device, MoE layers are inside of full graphs and nothing here is needed.
"""

from collections.abc import Callable
from typing import Any

import torch
import vllm.envs as envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context
from vllm.logger import init_logger
from vllm.platforms import current_platform

from .. import seams

logger = init_logger(__name__)

EXPERT_OPS = ("vllm::moe_forward", "vllm::moe_forward_shared")
"""The operations that vLLM's compiled models have for a MoE layer on GPUs."""


def install() -> None:
    seams.RUN_EXPERTS.wrap(_into_kept_buffers)


def split_at_experts(vllm_config: Any) -> None:
    """Have models compiled in pieces that end at MoE layers, where they are compiled in pieces at all.

    Before workers start: what is compiled is kept under a hash of the configuration. It costs full graphs nothing.
    """
    if current_platform.is_cuda_alike() and _in_pieces(vllm_config.compilation_config):
        operations = vllm_config.compilation_config.splitting_ops
        operations += [name for name in EXPERT_OPS if name not in operations]


def leave_experts_out_of_graphs(vllm_config: Any) -> None:
    """The host manages experts: graphs may hold everything but MoE layers.

    In a worker, before its model runner looks at which graphs it captures.
    """
    compilation = vllm_config.compilation_config
    before = compilation.cudagraph_mode
    if before is None or before == CUDAGraphMode.NONE:
        return
    if _in_pieces(compilation) and not envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        return
    compilation.cudagraph_mode = CUDAGraphMode.NONE
    logger.warning(
        "no CUDA graphs, which slows short steps down: with experts that the host manages they must end "
        "at each MoE layer, which takes compilation mode VLLM_COMPILE, splitting_ops that are not empty, and no "
        "VLLM_USE_BREAKABLE_CUDAGRAPH"
    )


def _in_pieces(compilation: Any) -> bool:
    return compilation.mode == CompilationMode.VLLM_COMPILE and bool(compilation.splitting_ops)


class KeptOutputs:
    """Where the outputs of one MoE layer lie, for each shape of a batch that graphs were captured for.

    Buffers are never freed or moved: captured graphs read them. Graphs of the largest batch are captured first, so that
    the smaller ones find room in its buffers.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._places: dict[tuple[BatchDescriptor, int], torch.Tensor] = {}

    def keep(self, batch: BatchDescriptor, outputs: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """``outputs`` (``[rows, …]`` each) copied to where those of the same batch and number always are."""
        kept = []
        for number, output in enumerate(outputs):
            if output is not None:
                if (batch, number) not in self._places:
                    self._places[batch, number] = self._room_for(output, number)
                place = self._places[batch, number]
                assert place.shape == output.shape and place.dtype == output.dtype
                output = place.copy_(output)
            kept.append(output)
        return kept

    def _room_for(self, output: torch.Tensor, number: int) -> torch.Tensor:
        """Rows of a buffer that no other output of the same step lies in."""
        taken = {place.untyped_storage().data_ptr() for (_, of), place in self._places.items() if of != number}
        for buffer in self._buffers:
            fits = buffer.shape[1:] == output.shape[1:] and buffer.dtype == output.dtype
            if fits and len(buffer) >= len(output) and buffer.untyped_storage().data_ptr() not in taken:
                return buffer[: len(output)]
        self._buffers.append(torch.empty_like(output, memory_format=torch.contiguous_format))
        return self._buffers[-1]


def _into_kept_buffers(run_experts: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = run_experts(self, *args, **kwargs)
        kept: KeptOutputs | None = getattr(self.routed_experts.quant_method, "kept_outputs", None)
        if kept is None:
            return output
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return output
        batch = context.batch_descriptor
        assert batch is not None, "graphs are captured for a shape of batch"
        if isinstance(output, torch.Tensor):
            return kept.keep(batch, (output,))[0]
        return tuple(kept.keep(batch, output))

    return run
