"""KV cache per request, against what is known of published models."""

import pytest

from vllm_moe_offload.plan.kv_cache import has_state, kv_cache_bytes
from vllm_moe_offload.plan.model_config import ModelConfig

GQA = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
}


def nbytes(config: dict[str, object], context: int) -> int:
    return kv_cache_bytes(ModelConfig("model", config), context)


def test_grouped_query_attention() -> None:
    assert nbytes(GQA, 8192) == 8192 * 48 * 2 * 4 * 128 * 2


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    """DeepSeek-V3 keeps 576 numbers per token and layer: 70 KB in bfloat16, as its authors say."""
    config = GQA | {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert nbytes(config, 1) == 61 * 576 * 2 == 70_272


@pytest.mark.parametrize(
    ("more", "full", "sliding"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"] * 24, "sliding_window": 128}, 24, 24),
        ({"sliding_window": 128}, 0, 48),
        ({"sliding_window": 128, "use_sliding_window": False}, 48, 0),
        ({"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 40}, 40, 8),
        ({"sliding_window": 128, "sliding_window_pattern": 6}, 8, 40),
        ({"sliding_window": None}, 48, 0),
        ({"full_attention_interval": 4}, 12, 0),
        ({"attn_layer_period": 8, "attn_layer_offset": 4}, 6, 0),
    ],
)
def test_layers_that_do_not_keep_everything(more: dict[str, object], full: int, sliding: int) -> None:
    config, per_token = GQA | more, 2 * 4 * 128 * 2
    assert nbytes(config, 4096) == (4096 * full + 128 * sliding) * per_token
    assert nbytes(config, 100) == 100 * (full + sliding) * per_token
    assert has_state(ModelConfig("model", config)) == (full + sliding < 48)


def test_a_cache_in_eight_bits() -> None:
    half = nbytes(GQA, 1000) // 2
    assert nbytes(GQA | {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}}, 1000) == half
    assert nbytes(GQA | {"quantization_config": {"kv_cache_quant_algo": "FP8"}}, 1000) == half


def test_a_nested_configuration() -> None:
    assert nbytes({"model_type": "outer", "text_config": GQA}, 10) == nbytes(GQA, 10)
