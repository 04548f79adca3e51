"""Recipes whose routed experts are quantized, everything else bfloat16; and what vLLM's CPU platform cannot run.

No quantized kernel of vLLM 0.32 runs on x86 without AMX; `requires` says so, for tests to skip by name.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from .architectures import qwen3_moe
from .gpt_oss import gpt_oss
from .packing import (
    FP8_BLOCK,
    GROUP,
    Stored,
    awq,
    fp8_per_block,
    fp8_per_tensor,
    gptq,
    int4_unpacked,
    int8_per_channel,
    mxfp4,
    packed_integers,
)
from .recipe import Recipe, Tensors

EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")
UNQUANTIZED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate")


def base() -> Recipe:
    return qwen3_moe(hidden=256, intermediate=128, count=8, layers=3)


def quantize_experts(quantize: Callable[[torch.Tensor], Stored], tensors: Tensors) -> Tensors:
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if EXPERT_WEIGHT.search(name):
            stored |= {name.removesuffix("weight") + part: value for part, value in quantize(tensor.float()).items()}
        else:
            stored[name] = tensor
    return stored


def quantized_base(
    quantize: Callable[[torch.Tensor], Stored], config: dict[str, object], requires: str, notes: str
) -> Recipe:
    recipe = base()
    return replace(
        recipe,
        config={**recipe.config, "quantization_config": config},
        finish=partial(quantize_experts, quantize),
        requires=requires,
        notes=notes,
    )


def unquantized_modules() -> list[str]:
    layers = range(base().routed_layers)
    return ["lm_head", *(f"model.layers.{layer}.{module}" for layer in layers for module in UNQUANTIZED)]


def fp8_config(**more: object) -> dict[str, object]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": unquantized_modules(),
        **more,
    }


def compressed_tensors_config(
    layout: str, weights: dict[str, object], activations: dict[str, object] | None
) -> dict[str, object]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": unquantized_modules(),
        "kv_cache_scheme": None,
    }


def integers(bits: int, strategy: str, *, group: int | None = None, dynamic: bool = False) -> dict[str, object]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
        "actorder": None,
    }


def fp8_block() -> Recipe:
    config = fp8_config(weight_block_size=[FP8_BLOCK, FP8_BLOCK])
    recipe = quantized_base(fp8_per_block, config, "amx", "DeepSeek's format: one scale per 128 x 128 weights")
    return replace(recipe, rounded_by_batch=True)


def fp8_block_online() -> Recipe:
    engine_args = {"quantization": "fp8_per_block"}
    return replace(base(), engine_args=engine_args, requires="amx", notes="bfloat16 on disk, quantized while loading")


def fp8_tensor() -> Recipe:
    return quantized_base(fp8_per_tensor, fp8_config(), "gpu", "one scale per expert matrix")


def int8_w8a8() -> Recipe:
    tokens = integers(8, "token", dynamic=True)
    config = compressed_tensors_config("int-quantized", integers(8, "channel"), tokens)
    return quantized_base(int8_per_channel, config, "amx", "int8 weights per channel, activations per token")


def int8_w8a16() -> Recipe:
    config = compressed_tensors_config("pack-quantized", integers(8, "group", group=GROUP), None)
    return quantized_base(partial(packed_integers, bits=8), config, "gpu", "four int8 weights in an int32")


def int4_w4a16() -> Recipe:
    config = compressed_tensors_config("pack-quantized", integers(4, "group", group=GROUP), None)
    return quantized_base(partial(packed_integers, bits=4), config, "amx", "eight int4 weights in an int32")


def int4_w4a8() -> Recipe:
    tokens = integers(8, "token", dynamic=True)
    config = compressed_tensors_config("int-quantized", integers(4, "group", group=GROUP), tokens)
    return quantized_base(int4_unpacked, config, "arm", "int4 weights stored one a byte")


def awq_int4() -> Recipe:
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["self_attn", "lm_head", "mlp.gate"],
    }
    return quantized_base(awq, config, "amx", "asymmetric: zero points matter")


def gptq_int4() -> Recipe:
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {r"-:.*self_attn.*": {}, r"-:.*mlp\.gate$": {}},
    }
    return quantized_base(gptq, config, "amx", "symmetric; zero points stored minus one")


def mxfp4_experts(tensors: Tensors) -> Tensors:
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[f"{name}_blocks"], stored[f"{name}_scales"] = mxfp4(tensor.float().transpose(1, 2))
        else:
            stored[name] = tensor
    return stored


def gpt_oss_mxfp4() -> Recipe:
    recipe = gpt_oss()
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return replace(
        recipe,
        config={**recipe.config, "quantization_config": config},
        finish=mxfp4_experts,
        requires="amx",
        notes="the published form of GPT-OSS: two weights a byte, a power of two per 32 weights",
    )


UNSUPPORTED_BY_VLLM_CPU = {
    "fp8-tensor": "both FP8 experts kernels of the CPU platform take 128 x 128 blocks only; loading already fails: "
    "_C::static_scaled_fp8_quant() expected at most 0 argument(s) but received 4",
    "int8-w8a16": "No WNA16 MoE backend supports the deployment configuration: the CPU platform's kernel is int4 only",
    "int4-w4a8": "No W4A8 Int8 MoE backend supports the deployment configuration: kernel only supports Arm CPU",
}
"""Checkpoints that no x86 CPU runs with vLLM 0.32, and the reason it gives."""

QUANTIZED = {
    "fp8-block": fp8_block,
    "fp8-block-online": fp8_block_online,
    "fp8-tensor": fp8_tensor,
    "int8-w8a8": int8_w8a8,
    "int8-w8a16": int8_w8a16,
    "int4-w4a16": int4_w4a16,
    "int4-w4a8": int4_w4a8,
    "awq-int4": awq_int4,
    "gptq-int4": gptq_int4,
    "gpt-oss-mxfp4": gpt_oss_mxfp4,
}
