"""GPT-OSS: experts with biases and a clamped activation, attention sinks, a sliding window in every other layer."""

from .layers import DOWN_GAIN, attention, bias, layer_norms, model_ends, prefixed, router
from .recipe import VOCAB, Layout, Normal, Recipe

HIDDEN, INTERMEDIATE, COUNT, TOP_K, LAYERS = 128, 96, 8, 2, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def gpt_oss_attention() -> Layout:
    return {
        **prefixed("self_attn", attention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM)),
        "self_attn.q_proj.bias": bias(HEADS * HEAD_DIM),
        "self_attn.k_proj.bias": bias(KV_HEADS * HEAD_DIM),
        "self_attn.v_proj.bias": bias(KV_HEADS * HEAD_DIM),
        "self_attn.o_proj.bias": bias(HIDDEN),
        "self_attn.sinks": Normal((HEADS,), 1.0),
    }


def gpt_oss_layout() -> Layout:
    """Expert matrices are stored input-major; rows of gate and up alternate."""
    layer = {
        **layer_norms(HIDDEN),
        **gpt_oss_attention(),
        "mlp.router.weight": router(COUNT, HIDDEN),
        "mlp.router.bias": bias(COUNT),
        "mlp.experts.gate_up_proj": Normal((COUNT, HIDDEN, 2 * INTERMEDIATE), HIDDEN**-0.5),
        "mlp.experts.gate_up_proj_bias": Normal((COUNT, 2 * INTERMEDIATE), 0.2),
        "mlp.experts.down_proj": Normal((COUNT, INTERMEDIATE, HIDDEN), DOWN_GAIN * INTERMEDIATE**-0.5),
        "mlp.experts.down_proj_bias": Normal((COUNT, HIDDEN), 0.2),
    }
    layout = dict(model_ends(HIDDEN))
    for index in range(LAYERS):
        layout |= prefixed(f"model.layers.{index}", layer)
    return layout


def gpt_oss_config() -> dict[str, object]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": COUNT,
        "num_experts_per_tok": TOP_K,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "sliding_window": 16,
        "attention_bias": True,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "max_position_embeddings": 1024,
        "initial_context_length": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 256,
            "truncate": False,
        },
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def gpt_oss() -> Recipe:
    notes = "GptOssRoutedExperts, a subclass of RoutedExperts; expert biases are a few hundred bytes each"
    return Recipe(gpt_oss_config(), gpt_oss_layout(), LAYERS, COUNT, TOP_K, notes)
