"""The one place where what a layer was routed to comes to the host, and where slots and rows go to the kernel's device.

The tensors of the CPU platform are looked at in place. Where kernels run on another device, this is where the forward
pass waits for it and copies.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def experts_on_host(topk_ids: torch.Tensor) -> NDArray[np.integer[Any]]:
    """``[rows, top_k]``: the numbers of the experts that the router chose, in the model."""
    return _on_host(topk_ids)


def own_experts(experts: NDArray[np.integer[Any]], expert_map: torch.Tensor | None) -> NDArray[np.integer[Any]]:
    """``[rows, top_k]``: the same among the experts of this worker, -1 for those of others.

    Args:
        expert_map: ``[experts]``, number of each expert here or -1; None where all are here.
    """
    return experts if expert_map is None else _on_host(expert_map)[experts]


def floats_on_host(tensor: torch.Tensor) -> NDArray[np.float32]:
    """The router's weights, or what it read."""
    return _on_host(tensor.float())


def on_device(numbers: NDArray[np.integer[Any]], like: torch.Tensor) -> torch.Tensor:
    """Slots or rows where ``like`` is."""
    tensor = torch.from_numpy(numbers)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor.to(like.device)


def _on_host(tensor: torch.Tensor) -> NDArray[Any]:
    """The values, once the work that gives them is done; the tensor's own memory where that is on the host."""
    if not tensor.is_cuda:
        return tensor.numpy()
    # memory of torch's own pinned pool, which belongs to the array until that is gone
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    return copy.numpy()
