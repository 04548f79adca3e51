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
    """Where the outputs of a model's MoE layers lie, for each shape of a batch that graphs were captured for.

    Buffers are never freed or moved: captured graphs read them. A layer shares those of an earlier one that nothing
    holds any more when its place is chosen, which is while graphs are captured, as what runs between two of them holds
    what later ones read. Of two neighbours they are never the same, so where nothing is held for long two sets do.
    Graphs of the largest batch are captured first, so that the smaller ones find room in its buffers.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._places: dict[tuple[BatchDescriptor, str, int], torch.Tensor] = {}
        """The buffer by batch, layer and number of the output."""
        self._before: set[int] = set()
        """Addresses of the buffers of the layer that ran before this one."""
        self._now: set[int] = set()
        """Of this one."""

    def keep(
        self, batch: BatchDescriptor, layer: str, outputs: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """``outputs`` (``[rows, …]`` each) copied to where those of the same batch, layer and number always are."""
        kept = []
        self._before, self._now = self._now, set()
        for number, output in enumerate(outputs):
            if output is not None:
                key = batch, layer, number
                if key not in self._places:
                    self._places[key] = self._room_for(output)
                buffer = self._places[key]
                self._now.add(buffer.data_ptr())
                output = buffer[: len(output)].copy_(output)
            kept.append(output)
        return kept

    def _room_for(self, output: torch.Tensor) -> torch.Tensor:
        """A buffer that neither this layer nor the one before uses, and that nothing else refers to."""
        for buffer in self._buffers:
            fits = buffer.shape[1:] == output.shape[1:] and buffer.dtype == output.dtype and len(buffer) >= len(output)
            if fits and buffer.data_ptr() not in self._before | self._now and not _is_held(buffer):
                return buffer
        self._buffers.append(torch.empty_like(output, memory_format=torch.contiguous_format))
        return self._buffers[-1]


def kept_bytes(rows: int, row_bytes: int) -> int:
    """Memory of the outputs that are kept: two of a layer, one of shared experts, in two sets.

    Args:
        rows: of the largest batch that graphs are captured for.
        row_bytes: of hidden states.
    """
    return 2 * 2 * rows * row_bytes


def _is_held(buffer: torch.Tensor) -> bool:
    """Whether a view of it is somewhere."""
    storage = buffer.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > _OWN_REFERENCES


_OWN_REFERENCES = 2
"""To a storage that is looked at: of its tensor and of what ``untyped_storage`` returns."""


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
            return kept.keep(batch, self.routed_experts.layer_name, (output,))[0]
        return tuple(kept.keep(batch, self.routed_experts.layer_name, output))

    return run
