"""Whether experts in a GPU's memory are managed on the GPU, or by the host, which reads the routing of each layer.

On the GPU wherever possible: steps then run inside of full CUDA graphs and wait for no host. There is nothing to set.
"""

from typing import Any

import torch
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.platforms.interface import in_wsl

from ...sizes import size_text

logger = init_logger(__name__)

PREDICTORS = ("history", "none")
"""Those that the host need not ask between layers."""
MICROSECONDS_PER_LAYER = 80
"""What it costs that the host looks at each MoE layer's routing: read from sources and added up, not measured."""


def obstacle(host_slots: int, experts: int, record_bytes: int, unregistered: str) -> str:
    """Why the GPU cannot manage experts by itself; empty if it can.

    Args:
        host_slots: records that host memory holds at a time.
        experts: of all layers.
        record_bytes: mean size of a record.
        unregistered: why the GPU cannot read host memory where it lies; empty where it can.
    """
    if host_slots < experts:
        return (
            f"host memory holds {host_slots} of {experts} experts (all take {size_text(experts * record_bytes)}; see "
            "host_cache)"
        )
    if unregistered:
        wsl = "; under WSL set VLLM_WSL2_ENABLE_PIN_MEMORY=1" if in_wsl() else ""
        return f"the GPU cannot read host memory where it lies: {unregistered}{wsl}"
    return ""


def obstacle_of_any(own: str) -> str:
    """The obstacle of the first rank that has one: ranks run the same graphs, so all experts are managed alike.

    All workers of an engine must ask.
    """
    group = get_world_group()
    obstacles: list[Any] = [""] * group.world_size
    torch.distributed.all_gather_object(obstacles, own, group=group.cpu_group)
    return next((found for found in obstacles if found), "")


def log_mode(obstacle: str, layers: int) -> None:
    """Log once what manages the experts of ``layers`` MoE layers, and why, and what it costs."""
    if not obstacle:
        logger.info("the GPU manages its experts by itself")
        return
    logger.warning(
        "the host manages the GPU's experts, about %d us for each MoE layer, %.1f ms a step: %s",
        MICROSECONDS_PER_LAYER,
        MICROSECONDS_PER_LAYER * layers / 1000,
        obstacle,
    )
