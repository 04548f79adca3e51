"""Quantization methods of vLLM with kernels that it would choose elsewhere; their processing runs on the host too."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.integration.moe_layers import HIDDEN, INTERMEDIATE, MoELayer, moe_config
from vllm_moe_offload.integration.method import OffloadedMoEMethod


@contextmanager
def one_host() -> Iterator[None]:
    """A process that is all ranks, with the operations that processing needs and that vLLM for CPUs does not have."""
    from vllm import _custom_ops, distributed
    from vllm.config import VllmConfig, set_current_vllm_config

    torch.cpu._init_amx()  # the system lets a process use tiles when it asks, as a worker does

    def scaled_fp8_quant(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (values.float() / scale).to(torch.float8_e4m3fn), scale

    def repack(weights: torch.Tensor, size_k: int, size_n: int, bits: int, is_a_8bit: bool) -> torch.Tensor:
        """Of the shape that Marlin reads, if not in its order."""
        return weights.reshape(len(weights), size_k // 16, size_n * (bits // 2)).clone()

    with (
        set_current_vllm_config(VllmConfig()),
        mock.patch.object(_custom_ops, "gptq_marlin_moe_repack", repack),
        mock.patch.object(_custom_ops, "scaled_fp8_quant", scaled_fp8_quant),
        mock.patch.object(distributed, "get_tensor_model_parallel_world_size", lambda: 1),
    ):
        yield


Loaded = tuple[MoELayer, OffloadedMoEMethod]


def unquantized_on_cpu() -> Loaded:
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    config = moe_config()
    return created(MoELayer(config), UnquantizedFusedMoEMethod(config))


def unquantized_for_triton() -> Loaded:
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as module
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    chosen = module.UnquantizedMoeBackend.TRITON, TritonExperts
    config = moe_config(torch.float16, has_bias=True)
    with mock.patch.object(module, "select_unquantized_moe_backend", lambda **_: chosen):
        return created(MoELayer(config), module.UnquantizedFusedMoEMethod(config))


def fp8(experts: str, block: list[int] | None, scheme: str = "dynamic") -> Loaded:
    from vllm.model_executor.layers.fused_moe.experts import triton_cutlass_moe, triton_moe
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
    from vllm.model_executor.layers.quantization import fp8 as module

    classes = vars(triton_moe) | vars(triton_cutlass_moe)
    chosen = Fp8MoeBackend.TRITON, classes[experts]
    config = moe_config()
    layer = MoELayer(config)
    quantization = module.Fp8Config(True, scheme, weight_block_size=block)
    with mock.patch.object(module, "select_fp8_moe_backend", lambda **_: chosen):
        return created(layer, module.Fp8MoEMethod(quantization, layer))


def wna16(has_zero_points: bool) -> Loaded:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonWNA16Experts
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import moe_wna16 as module

    config = moe_config(torch.float16)
    quantization = module.MoeWNA16Config("gptq", 4, 32, has_zero_points, False, [], {})
    chosen = WNA16MoEBackend.TRITON, TritonWNA16Experts
    with mock.patch.object(module, "select_wna16_moe_backend", lambda **_: chosen):
        return created(MoELayer(config), module.MoeWNA16Method(quantization, config))


def gptq() -> Loaded:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_gptq as module

    config = moe_config(torch.float16)
    quantization = module.AutoGPTQConfig(4, 32, False, True, False, {}, {})
    chosen = WNA16MoEBackend.MARLIN, MarlinExperts
    with mock.patch.object(module, "select_wna16_moe_backend", lambda *_, **__: chosen):
        return created(MoELayer(config), module.AutoGPTQMoEMethod(quantization, config))


METHODS: dict[str, Callable[[], Loaded]] = {
    "unquantized, CPU": unquantized_on_cpu,
    "unquantized with biases, Triton": unquantized_for_triton,
    "fp8 per block, Triton": lambda: fp8("TritonExperts", [128, 128]),
    "fp8 per tensor, Triton": lambda: fp8("TritonExperts", None),
    "fp8 per tensor, Triton, static": lambda: fp8("TritonExperts", None, "static"),
    "fp8 per tensor, Triton or CUTLASS": lambda: fp8("TritonOrCutlassExperts", None),
    "int4, Triton": lambda: wna16(False),
    "int4 with zero points, Triton": lambda: wna16(True),
    "GPTQ, Marlin": gptq,
}


def created(layer: MoELayer, real: Any, weight_loader: Callable[..., Any] | None = None) -> Loaded:
    """The layer as vLLM makes it, without weights."""
    method = OffloadedMoEMethod(real, lambda *_: None, lambda *_: None)
    layer.quant_method = method
    method.create_weights(
        layer,
        num_experts=layer.local_num_experts,
        hidden_size=HIDDEN,
        intermediate_size_per_partition=INTERMEDIATE,
        params_dtype=layer.params_dtype,
        weight_loader=weight_loader,
    )
    return layer, method
