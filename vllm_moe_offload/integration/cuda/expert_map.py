"""Expert parallelism on GPUs: kernels skip the choices of other ranks by the layer's map, and apply it to any id.

vLLM's map is from experts to those of this rank. Where ids are slots, or slots change from step to step, the kernel is
given another one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def mapped_with(layer: torch.nn.Module, expert_map: torch.Tensor) -> Iterator[None]:
    """Kernels of ``layer`` map ids with ``expert_map``, int32 ``[experts of all ranks]``, while this is the context."""
    of_vllm = layer._expert_map
    layer._expert_map = expert_map
    try:
        yield
    finally:
        layer._expert_map = of_vllm


class SlotMap:
    """The map of a layer whose ids are slots: each is its own, and whatever is no slot of this rank is skipped.

    Args:
        expert_map: vLLM's, on the device of the kernels.
        rows: that the kernel is shown; fewer than there are experts.
    """

    def __init__(self, expert_map: torch.Tensor, rows: int):
        assert rows < len(expert_map), "with expert parallelism other ranks have experts too"
        self.expert_map = torch.full_like(expert_map, -1)
        self.expert_map[:rows] = torch.arange(rows)
        self._elsewhere = rows

    def ids(self, slots: torch.Tensor) -> torch.Tensor:
        """``slots`` as the kernel is given them: it looks every id up, so that of other ranks' experts is not -1."""
        return torch.where(slots < 0, self._elsewhere, slots)
