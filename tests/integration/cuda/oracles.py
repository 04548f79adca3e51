"""Run as a process of its own: which kernels vLLM's oracles choose where it takes this machine for one with a GPU.

vLLM is imported as it is; then its platform becomes one of CUDA, of each capability in turn. All kernels that are not
covered say that they run there, whatever they need. Prints one JSON object: capability -> scheme -> the kernel's
class, or the error; and under ``refused`` what is said of quantization methods that ask no oracle.
"""

import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import experts, modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle import (
    fp8,
    int8,
    int_wna16,
    mxfp4,
    mxfp8,
    nvfp4,
    unquantized,
    w4a8,
    w4a8_int8,
)
from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
from vllm.model_executor.layers.quantization.moe_wna16 import MoeWNA16Config
from vllm.model_executor.layers.quantization.utils import quant_utils as keys
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.integration.cuda import allow_list
from vllm_moe_offload.integration.support import refuse_method

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))


def pretended_gpu() -> Any:
    """A platform of CUDA whose class says of what capability it is."""
    for missing in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
        sys.modules.setdefault(missing, ModuleType(missing))
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class PretendedGpu(NonNvmlCudaPlatform):
        capability = CAPABILITIES[0]

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*cls.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "pretended GPU"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 100

    return PretendedGpu


def layer(**changed: Any) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=32,
        experts_per_token=4,
        hidden_dim=2048,
        intermediate_size=1024,
        num_local_experts=32,
        num_logical_experts=32,
        activation=changed.pop("activation", MoEActivation.SILU),
        device="cuda",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        **changed,
    )


def grouped(kind: type, **attributes: Any) -> Any:
    """A quantization configuration with nothing set but what choosing a kernel reads."""
    config = object.__new__(kind)
    vars(config).update({"group_size": 128, **attributes})
    return config


def int4(key: Any, config: Any, zero_points: bool) -> Any:
    return int_wna16.select_wna16_moe_backend(layer(), key, config, zero_points, False)


GPT_OSS = {"activation": MoEActivation.SWIGLUOAI, "has_bias": True}
SCHEMES: dict[str, Callable[[], Any]] = {
    "bf16": lambda: unquantized.select_unquantized_moe_backend(layer()),
    "bf16 gpt-oss": lambda: unquantized.select_unquantized_moe_backend(layer(**GPT_OSS)),
    "fp8 block": lambda: fp8.select_fp8_moe_backend(layer(), keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym, True),
    "fp8 tensor": lambda: fp8.select_fp8_moe_backend(layer(), keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym, True),
    "fp8 dynamic tensor": lambda: fp8.select_fp8_moe_backend(
        layer(), keys.kFp8StaticTensorSym, keys.kFp8DynamicTensorSym, True
    ),
    "fp8 channel": lambda: fp8.select_fp8_moe_backend(
        layer(), keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym, True
    ),
    "int8": lambda: int8.select_int8_moe_backend(layer()),
    "int4 GPTQ": lambda: int4(keys.kInt4Static, grouped(AutoGPTQConfig, desc_act=False), False),
    "int4 AWQ": lambda: int4(keys.kInt4StaticAsym, grouped(AutoAWQConfig), True),
    "int4 moe_wna16": lambda: int4(keys.kInt4Static, grouped(MoeWNA16Config), False),
    "mxfp4 gpt-oss": lambda: mxfp4.select_mxfp4_moe_backend(layer(**GPT_OSS)),
    "mxfp4": lambda: mxfp4.select_deepseek_v4_mxfp4_moe_backend(layer()),
    "mxfp8": lambda: mxfp8.select_mxfp8_moe_backend(layer()),
    "nvfp4": lambda: nvfp4.select_nvfp4_moe_backend(layer(), keys.kNvfp4Static, keys.kNvfp4Dynamic),
    "w4a8 fp8": lambda: w4a8.select_w4a8_moe_backend(layer()),
    "w4a8 int8": lambda: w4a8_int8.select_w4a8_int8_moe_backend(layer(), keys.kInt4Static, keys.kInt8DynamicTokenSym),
    "bf16 --moe-backend flashinfer_cutlass": lambda: unquantized.select_unquantized_moe_backend(
        layer(moe_backend="flashinfer_cutlass")
    ),
}


def descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def import_all(package: ModuleType) -> None:
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        with suppress(Exception):
            importlib.import_module(module.name)


def outcome(choose: Callable[[], Any]) -> str:
    try:
        with allow_list.choosing_kernel("the layer"):
            _, kernel = choose()
    except (UnsupportedError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return str(getattr(kernel, "__name__", kernel))


def said_without_oracle() -> dict[str, str]:
    """Of every method of vLLM's that asks no oracle what refuses it, or that nothing does."""
    said = {}
    for kind in set(descendants(FusedMoEMethodBase)):
        own = [part for part in kind.__mro__ if part.__module__.startswith(quantization.__name__)]
        if not own or inspect.isabstract(kind) or any("select_" in inspect.getsource(part) for part in own):
            continue
        method: Any = object.__new__(kind)
        vars(method).update(moe_kernel=None)
        try:
            refuse_method("the layer", method)
            said[kind.__name__] = "taken"
        except UnsupportedError as error:
            said[kind.__name__] = str(error)
    return said


def main() -> None:
    config = VllmConfig()
    for package in (experts, quantization):
        import_all(package)
    for kernel in set(descendants(modular_kernel.FusedMoEExperts)):
        if kernel.__name__ not in allow_list.COVERED and "Aiter" not in kernel.__name__:  # these ask a ROCm driver
            kernel._supports_current_device = staticmethod(lambda: True)  # type: ignore[attr-defined]
    allow_list.install()
    gpu = pretended_gpu()
    current_platform.__class__ = gpu
    config.model_config = SimpleNamespace(quantization_config=None, hf_text_config=SimpleNamespace(model_type=""))
    found: dict[str, dict[str, str]] = {}
    with set_current_vllm_config(config, check_compile=False):
        for gpu.capability in CAPABILITIES:
            major, minor = gpu.capability
            found[f"{major}.{minor}"] = {scheme: outcome(choose) for scheme, choose in SCHEMES.items()}
        found["refused"] = said_without_oracle()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
