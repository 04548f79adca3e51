"""Bytes of KV cache that one sequence takes, by the kind of attention of each layer."""

from collections.abc import Mapping

from .model_config import ModelConfig

_FULL, _SLIDING, _NONE = "full", "sliding", "none"
"""Of a layer: keeps every token; keeps those in its window; keeps a state whose size no context changes."""


def kv_cache_bytes(config: ModelConfig, context: int) -> int:
    """Of one sequence of ``context`` tokens, in the type that vLLM chooses by itself."""
    number = _number_bytes(config)
    window = config.integer("sliding_window", default=0)
    kept = {_FULL: context, _SLIDING: min(context, window) if window else context, _NONE: 0}
    latent = config.integer("kv_lora_rank", default=0)
    if latent:
        per_token = latent + config.integer("qk_rope_head_dim", default=0)
    else:
        per_token = 2 * config.kv_heads * config.head_dim
    return sum(kept[_kind(config, layer)] for layer in range(config.layers)) * per_token * number


def has_state(config: ModelConfig) -> bool:
    """Whether some layers keep a state (linear attention, Mamba), which no figure here counts."""
    return any(_kind(config, layer) == _NONE for layer in range(config.layers))


def _kind(config: ModelConfig, layer: int) -> str:
    values = config.values
    kinds = values.get("layer_types") or values.get("layers_block_type") or values.get("attn_type_list")
    if isinstance(kinds, list) and layer < len(kinds):
        kind = str(kinds[layer])
        if "linear" in kind or "mamba" in kind or "conv" in kind or kind == "0":
            return _NONE
        return _SLIDING if "sliding" in kind or "chunked" in kind else _FULL
    if "attn_layer_period" in values:
        is_attention = layer % config.integer("attn_layer_period") == config.integer("attn_layer_offset", default=0)
        return _FULL if is_attention else _NONE
    if interval := config.integer("full_attention_interval", default=0):
        return _FULL if (layer + 1) % interval == 0 else _NONE
    if not values.get("sliding_window") or values.get("use_sliding_window") is False:
        return _FULL
    if pattern := config.integer("sliding_window_pattern", default=0):
        return _FULL if (layer + 1) % pattern == 0 else _SLIDING
    if values.get("use_sliding_window") and "max_window_layers" in values:
        return _SLIDING if layer >= config.integer("max_window_layers") else _FULL
    return _SLIDING


def _number_bytes(config: ModelConfig) -> int:
    scheme = config.quantization.get("kv_cache_scheme")
    in_eight_bits = isinstance(scheme, Mapping) and scheme.get("num_bits") == 8
    if in_eight_bits or str(config.quantization.get("kv_cache_quant_algo", "")).upper() == "FP8":
        return 1
    return config.number_bytes
