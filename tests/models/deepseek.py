"""DeepSeek-V2 and V3: latent attention, a dense first layer, shared experts, routing limited to groups of experts."""

from dataclasses import replace

import torch

from .layers import experts, gated_mlp, layer_norms, linear, model_ends, norm, prefixed, router
from .recipe import VOCAB, Layout, Normal, Recipe

# vLLM's CPU kernels for latent attention accept these two sizes only.
KV_LORA_RANK, ROPE_DIM = 512, 64
HIDDEN, HEADS, NOPE_DIM, VALUE_DIM = 128, 2, 64, 64
DENSE, INTERMEDIATE, COUNT, TOP_K, LAYERS = 256, 64, 16, 4, 4


def latent_attention(q_lora_rank: int | None) -> Layout:
    queries = HEADS * (NOPE_DIM + ROPE_DIM)
    layout = {
        "kv_a_proj_with_mqa.weight": linear(KV_LORA_RANK + ROPE_DIM, HIDDEN),
        "kv_a_layernorm.weight": norm(KV_LORA_RANK),
        "kv_b_proj.weight": linear(HEADS * (NOPE_DIM + VALUE_DIM), KV_LORA_RANK),
        "o_proj.weight": linear(HIDDEN, HEADS * VALUE_DIM, 2.0),
    }
    if q_lora_rank is None:
        return layout | {"q_proj.weight": linear(queries, HIDDEN)}
    return layout | {
        "q_a_proj.weight": linear(q_lora_rank, HIDDEN),
        "q_a_layernorm.weight": norm(q_lora_rank),
        "q_b_proj.weight": linear(queries, q_lora_rank),
    }


def deepseek_layout(q_lora_rank: int | None, shared: int, routing: Layout) -> Layout:
    layer = {**layer_norms(HIDDEN), **prefixed("self_attn", latent_attention(q_lora_rank))}
    sparse = {
        **prefixed("mlp.gate", routing),
        **prefixed("mlp.experts", experts(COUNT, HIDDEN, INTERMEDIATE)),
        **prefixed("mlp.shared_experts", gated_mlp(HIDDEN, shared * INTERMEDIATE)),
    }
    layout = dict(model_ends(HIDDEN))
    layout |= prefixed("model.layers.0", layer | prefixed("mlp", gated_mlp(HIDDEN, DENSE)))
    for index in range(1, LAYERS):
        layout |= prefixed(f"model.layers.{index}", layer | sparse)
    return layout


def deepseek_config(architecture: str, model_type: str, q_lora_rank: int | None, shared: int) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "q_lora_rank": q_lora_rank,
        "kv_lora_rank": KV_LORA_RANK,
        "qk_nope_head_dim": NOPE_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": VALUE_DIM,
        "n_routed_experts": COUNT,
        "n_shared_experts": shared,
        "num_experts_per_tok": TOP_K,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        # Published checkpoints scale too; without it vLLM 0.32's CPU kernel rotates the strided queries wrongly and
        # the same prompt twice in a batch gives different tokens.
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def deepseek_v2() -> Recipe:
    config = deepseek_config("DeepseekV2ForCausalLM", "deepseek_v2", None, shared=2) | {
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.0,
    }
    layout = deepseek_layout(None, 2, {"weight": router(COUNT, HIDDEN)})
    notes = "softmax scores, groups ranked by their best expert, weights scaled and not renormalized"
    return Recipe(config, layout, LAYERS - 1, COUNT, TOP_K, notes)


def deepseek_v3() -> Recipe:
    q_lora_rank = 96
    config = deepseek_config("DeepseekV3ForCausalLM", "deepseek_v3", q_lora_rank, shared=1) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    }
    routing = {
        "weight": router(COUNT, HIDDEN),
        "e_score_correction_bias": Normal((COUNT,), 0.2, dtype=torch.float32),
    }
    layout = deepseek_layout(q_lora_rank, 1, routing)
    notes = "sigmoid scores plus a correction bias that steers selection only; groups ranked by their two best"
    return Recipe(config, layout, LAYERS - 1, COUNT, TOP_K, notes)


def deepseek_v3_with_mtp() -> Recipe:
    """Its last layer predicts the token after the next: a drafter in the same checkpoint, with experts of its own."""
    base = deepseek_v3()
    last = f"model.layers.{LAYERS - 1}."
    layer = {name.removeprefix(last): normal for name, normal in base.layout.items() if name.startswith(last)}
    layer |= {
        "embed_tokens.weight": base.layout["model.embed_tokens.weight"],
        "enorm.weight": norm(HIDDEN),
        "hnorm.weight": norm(HIDDEN),
        "eh_proj.weight": linear(HIDDEN, 2 * HIDDEN),
        "shared_head.norm.weight": norm(HIDDEN),
        "shared_head.head.weight": base.layout["lm_head.weight"],
    }
    layout = base.layout | prefixed(f"model.layers.{LAYERS}", layer)
    return replace(base, config={**base.config, "num_nextn_predict_layers": 1}, layout=layout)
