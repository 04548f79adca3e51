"""Bytes of a model computed from its config.json alone: the usual parts of a transformer, and formats by their bits."""

import re
from collections.abc import Mapping
from typing import Any

from .model_config import ModelConfig

_SCALE_BYTES = 2
_FP8_BLOCK_SCALE_BYTES = 4
_MXFP4_BITS = 4 + 8 / 32


def expert_bytes(config: ModelConfig) -> int:
    """Of one routed expert, with its scales."""
    weights = 3 * config.hidden * config.expert_width
    nbytes = weights * _bits_per_weight(config) / 8
    if config.values.get("model_type") == "gpt_oss":
        nbytes += (2 * config.expert_width + config.hidden) * config.number_bytes
    return int(nbytes)


def dense_bytes(config: ModelConfig) -> tuple[int, int]:
    """Of everything but routed experts, and of the embedding table among it."""
    hidden, number = config.hidden, config.number_bytes
    table = config.integer("vocab_size", default=0) * hidden
    moe = set(config.moe_layers)
    shared = _shared_width(config)
    total = table * (1 if config.is_tied else 2)
    for layer in range(config.layers):
        total += _attention(config) + 2 * hidden
        if layer in moe:
            total += config.experts * hidden + 3 * hidden * shared
        else:
            total += 3 * hidden * config.integer("intermediate_size_mlp", "intermediate_size", default=4 * hidden)
    return total * number, table * number


def _shared_width(config: ModelConfig) -> int:
    """Intermediate size of all shared experts of a layer together."""
    given = config.integer("shared_expert_intermediate_size", "shared_intermediate_size", default=0)
    if given:
        return given
    count = config.integer("n_shared_experts", "num_shared_experts", "num_shared_expert", default=0)
    return count * config.expert_width


def _attention(config: ModelConfig) -> int:
    hidden, heads = config.hidden, config.heads
    latent = config.integer("kv_lora_rank", default=0)
    if not latent:
        return hidden * config.head_dim * 2 * (heads + config.kv_heads)
    rope, plain = config.integer("qk_rope_head_dim", default=0), config.integer("qk_nope_head_dim", default=0)
    value = config.integer("v_head_dim", default=plain)
    rank = config.integer("q_lora_rank", default=0)
    queries = rank * (hidden + heads * (plain + rope)) if rank else hidden * heads * (plain + rope)
    keys = hidden * (latent + rope) + latent * heads * (plain + value)
    return queries + keys + heads * value * hidden


def _bits_per_weight(config: ModelConfig) -> float:
    """Of an expert's weights, their scales and zero points included."""
    quantization = config.quantization
    method = str(quantization.get("quant_method", "")).lower()
    if not quantization:
        return 8.0 * config.number_bytes
    if method == "mxfp4":
        return _MXFP4_BITS
    if method == "fp8":
        block = quantization.get("weight_block_size")
        return 8 + (8 * _FP8_BLOCK_SCALE_BYTES / (block[0] * block[1]) if isinstance(block, list) and block else 0)
    weights = _compressed_weights(quantization)
    bits = weights.get("num_bits") or quantization.get("bits") or quantization.get("w_bit")
    if isinstance(bits, int | float):
        group = weights.get("group_size") or quantization.get("group_size") or quantization.get("q_group_size") or 0
        zero_points = bits if method in ("awq", "gptq") else 0
        return bits + ((8 * _SCALE_BYTES + zero_points) / group if group > 0 else 0)
    named = re.search(r"(?:nvfp|fp|int|w)(4|8)", f"{method} {quantization.get('quant_algo', '')}".lower())
    return float(named[1]) * 1.06 if named else 8.0 * config.number_bytes


def _compressed_weights(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the first group of a compressed-tensors configuration stores weights."""
    groups = quantization.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            if isinstance(group, Mapping) and isinstance(weights := group.get("weights"), Mapping):
                return weights
    return {}
