"""A device that is the host: memory only, for what neither copies nor waits."""

from typing import Any

import torch

from vllm_moe_offload.device.base import Device
from vllm_moe_offload.windows.plan import ALIGNMENT


class HostDevice(Device):
    """Memory of the host; whatever is enqueued is an error."""

    def __init__(self) -> None:
        self.allocated = 0

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.allocated += nbytes
        memory = torch.zeros(nbytes + ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + nbytes]

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is enqueued on this device")

    register = unregister = address = stream = copy = record = wait = finished = synchronize = _refuse
