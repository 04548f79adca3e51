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
    return topk_ids.numpy()


def own_experts_on_host(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> NDArray[np.integer[Any]]:
    """``[rows, top_k]``: the same among the experts of this worker, -1 for those of others.

    Args:
        expert_map: ``[experts]``, number of each expert here or -1; None where all are here.
    """
    return topk_ids.numpy() if expert_map is None else expert_map[topk_ids.long()].numpy()


def floats_on_host(tensor: torch.Tensor) -> NDArray[np.float32]:
    """The router's weights, or what it read."""
    return tensor.float().numpy()


def on_device(numbers: NDArray[np.integer[Any]], like: torch.Tensor) -> torch.Tensor:
    """Slots or rows where ``like`` is."""
    return torch.from_numpy(numbers).to(like.device)
