"""What vLLM and torch say about this machine."""

from pathlib import Path

import torch
import vllm
from vllm.platforms import current_platform


def platform() -> tuple[str, bool]:
    """The name of vLLM's platform, and whether it is one that offloading works on."""
    return str(current_platform.device_type), current_platform.is_cpu()


def cpu_features() -> list[str]:
    """The instruction sets by which vLLM chooses expert kernels."""
    widest = torch.backends.cpu.get_cpu_capability()
    return [widest, "AMX"] if torch.cpu._is_amx_tile_supported() else [widest]


def brings_tcmalloc() -> bool:
    """Whether this vLLM's wheel has a tcmalloc, which vLLM then preloads into its processes by itself."""
    return any(Path(vllm.__path__[0], "libs").glob("libtcmalloc*.so*"))
