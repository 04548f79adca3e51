"""What vLLM and torch say about this machine."""

import inspect
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.platforms import current_platform

from ..device import Device
from ..windows.speculative_loads import SpeculativeKernels


def platform() -> tuple[str, bool]:
    """The name of vLLM's platform, and whether it is one that offloading works on."""
    return str(current_platform.device_type), current_platform.is_cpu() or current_platform.is_cuda_alike()


def computes_on_device() -> bool:
    """Whether kernels of workers run elsewhere than on this processor. Any process may ask."""
    return not current_platform.is_cpu()


def device() -> Device | None:
    """What kernels of this worker run on, if that is not this processor."""
    if not computes_on_device():
        return None
    from ..device.cuda import CudaDevice

    return CudaDevice()


def managing_kernels(device: Device, most_experts: int) -> SpeculativeKernels:
    """By which ``device`` manages windows of layers of so many experts, at most."""
    from ..windows.launches import TritonKernels

    return TritonKernels(most_experts)


def cpu_features() -> list[str]:
    """The instruction sets by which vLLM chooses expert kernels."""
    widest = torch.backends.cpu.get_cpu_capability()
    return [widest, "AMX"] if torch.cpu._is_amx_tile_supported() else [widest]


def modular_cpu_experts() -> list[str]:
    """Names of vLLM's expert kernels for this CPU that take routing decisions from outside, as offloading needs.

    Raises:
        ImportError, AttributeError: this vLLM keeps them elsewhere.
    """
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    kernels: list[Any] = [value for value in vars(cpu_moe).values() if isinstance(value, type)]
    return sorted(
        kernel.__name__
        for kernel in kernels
        if issubclass(kernel, FusedMoEExperts)
        and not inspect.isabstract(kernel)
        and not kernel.is_monolithic()
        and kernel._supports_current_device()
    )


def brings_tcmalloc() -> bool:
    """Whether this vLLM's wheel has a tcmalloc, which vLLM then preloads into its processes by itself."""
    return any(Path(vllm.__path__[0], "libs").glob("libtcmalloc*.so*"))
