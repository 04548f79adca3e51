"""Recipes of tiny MoE checkpoints in their unquantized form, one per architecture family; never imports vllm."""

from .deepseek import deepseek_v2, deepseek_v3
from .gpt_oss import gpt_oss
from .layers import (
    DOWN_GAIN,
    attention,
    bias,
    experts,
    gated_mlp,
    layer_norms,
    linear,
    model_ends,
    norm,
    prefixed,
    router,
)
from .recipe import LM_HEAD_GAIN, VOCAB, Layout, Normal, Recipe

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32


def common_config(architecture: str, model_type: str, hidden: int, layers: int) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def stack(hidden: int, layers: int, layer: Layout) -> Layout:
    layout = dict(model_ends(hidden))
    for index in range(layers):
        layout |= prefixed(f"model.layers.{index}", layer)
    return layout


def mixtral() -> Recipe:
    hidden, intermediate, count, top_k, layers = 96, 160, 8, 2, 3
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, KV_HEADS, HEAD_DIM)),
        "block_sparse_moe.gate.weight": router(count, hidden),
        **prefixed("block_sparse_moe.experts", experts(count, hidden, intermediate, ("w1", "w3", "w2"))),
    }
    config = common_config("MixtralForCausalLM", "mixtral", hidden, layers) | {
        "intermediate_size": intermediate,
        "num_local_experts": count,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
    }
    notes = "w2 of one expert is 30720 bytes: 7.5 pages of 4096"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


def qwen2_moe() -> Recipe:
    hidden, intermediate, shared, count, top_k, layers = 128, 96, 160, 12, 4, 4
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, KV_HEADS, HEAD_DIM)),
        "self_attn.q_proj.bias": bias(HEADS * HEAD_DIM),
        "self_attn.k_proj.bias": bias(KV_HEADS * HEAD_DIM),
        "self_attn.v_proj.bias": bias(KV_HEADS * HEAD_DIM),
        "mlp.gate.weight": router(count, hidden),
        **prefixed("mlp.experts", experts(count, hidden, intermediate)),
        **prefixed("mlp.shared_expert", gated_mlp(hidden, shared)),
        "mlp.shared_expert_gate.weight": linear(1, hidden),
    }
    config = common_config("Qwen2MoeForCausalLM", "qwen2_moe", hidden, layers) | {
        "intermediate_size": shared,
        "moe_intermediate_size": intermediate,
        "shared_expert_intermediate_size": shared,
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }
    notes = "shared expert behind a sigmoid gate; top-k weights not renormalized"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


def qwen3_moe(hidden: int = 128, intermediate: int = 64, count: int = 16, layers: int = 4) -> Recipe:
    top_k = 4
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, KV_HEADS, HEAD_DIM)),
        "self_attn.q_norm.weight": norm(HEAD_DIM),
        "self_attn.k_norm.weight": norm(HEAD_DIM),
        "mlp.gate.weight": router(count, hidden),
        **prefixed("mlp.experts", experts(count, hidden, intermediate)),
    }
    config = common_config("Qwen3MoeForCausalLM", "qwen3_moe", hidden, layers) | {
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": intermediate,
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    notes = "top-k weights renormalized; the base of the quantized variants"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


def qwen3_moe_transformers() -> Recipe:
    base = qwen3_moe()
    return Recipe(
        base.config,
        base.layout,
        base.routed_layers,
        base.experts,
        base.top_k,
        notes="the same checkpoint through vLLM's Transformers backend: TransformersRoutedExperts",
        engine_args={"model_impl": "transformers"},
    )


def olmoe() -> Recipe:
    hidden, intermediate, count, top_k, layers = 128, 48, 16, 4, 3
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, HEADS, HEAD_DIM)),
        "self_attn.q_norm.weight": norm(HEADS * HEAD_DIM),
        "self_attn.k_norm.weight": norm(HEADS * HEAD_DIM),
        "mlp.gate.weight": router(count, hidden),
        **prefixed("mlp.experts", experts(count, hidden, intermediate)),
    }
    config = common_config("OlmoeForCausalLM", "olmoe", hidden, layers) | {
        "num_key_value_heads": HEADS,
        "intermediate_size": intermediate,
        "num_experts": count,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": False,
        "clip_qkv": None,
    }
    notes = "intermediate size 48: vLLM's CPU kernels pad it to 64, so packed experts are larger than stored ones"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


def granite_moe() -> Recipe:
    hidden, intermediate, count, top_k, layers = 128, 96, 8, 2, 3
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, KV_HEADS, HEAD_DIM)),
        "block_sparse_moe.router.layer.weight": router(count, hidden),
        "block_sparse_moe.input_linear.weight": Normal((count, 2 * intermediate, hidden), hidden**-0.5),
        "block_sparse_moe.output_linear.weight": Normal((count, hidden, intermediate), DOWN_GAIN * intermediate**-0.5),
    }
    config = common_config("GraniteMoeForCausalLM", "granitemoe", hidden, layers) | {
        "intermediate_size": intermediate,
        "num_local_experts": count,
        "num_experts_per_tok": top_k,
        "attention_bias": False,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 1.5,
        "logits_scaling": 2.0,
    }
    notes = "all experts of a projection in one stored tensor; scaled embeddings, residuals and logits"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


def dbrx() -> Recipe:
    hidden, intermediate, count, top_k, layers = 128, 96, 8, 2, 3
    layer = {
        "norm_attn_norm.norm_1.weight": norm(hidden),
        "norm_attn_norm.norm_2.weight": norm(hidden),
        "norm_attn_norm.attn.Wqkv.weight": linear((HEADS + 2 * KV_HEADS) * HEAD_DIM, hidden),
        "norm_attn_norm.attn.out_proj.weight": linear(hidden, hidden, 2.0),
        "ffn.router.layer.weight": router(count, hidden),
        "ffn.experts.routed_experts.mlp.w1": linear(count * intermediate, hidden),
        "ffn.experts.routed_experts.mlp.v1": linear(count * intermediate, hidden),
        "ffn.experts.routed_experts.mlp.w2": Normal((count * intermediate, hidden), DOWN_GAIN * intermediate**-0.5),
    }
    layout = {
        "transformer.wte.weight": Normal((VOCAB, hidden), 1.0),
        "transformer.norm_f.weight": norm(hidden),
        "lm_head.weight": linear(VOCAB, hidden, LM_HEAD_GAIN),
    }
    for index in range(layers):
        layout |= prefixed(f"transformer.blocks.{index}", layer)
    config = {
        "architectures": ["DbrxForCausalLM"],
        "model_type": "dbrx",
        "dtype": "bfloat16",
        "vocab_size": VOCAB,
        "d_model": hidden,
        "n_heads": HEADS,
        "n_layers": layers,
        "max_seq_len": 1024,
        "tie_word_embeddings": False,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": KV_HEADS, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": intermediate, "moe_num_experts": count, "moe_top_k": top_k},
    }
    return Recipe(config, layout, layers, count, top_k, notes="DbrxExperts, a subclass of RoutedExperts; LayerNorm")


def hunyuan_moe() -> Recipe:
    hidden, intermediate, count, top_k, layers = 128, 64, 8, 2, 3
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, HEADS, KV_HEADS, HEAD_DIM)),
        "self_attn.query_layernorm.weight": norm(HEAD_DIM),
        "self_attn.key_layernorm.weight": norm(HEAD_DIM),
        "mlp.gate.wg.weight": router(count, hidden),
        **prefixed("mlp.experts", experts(count, hidden, intermediate)),
        **prefixed("mlp.shared_mlp", gated_mlp(hidden, intermediate)),
    }
    config = common_config("HunYuanMoEV1ForCausalLM", "hunyuan_v1_moe", hidden, layers) | {
        "intermediate_size": intermediate,
        "num_experts": count,
        "moe_topk": top_k,
        "attention_bias": False,
    }
    notes = "vLLM has no model class of its own: Transformers backend, TransformersRoutedExperts"
    return Recipe(config, stack(hidden, layers, layer), layers, count, top_k, notes)


ARCHITECTURES = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "qwen3-moe-transformers": qwen3_moe_transformers,
    "olmoe": olmoe,
    "deepseek-v2": deepseek_v2,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
    "granite-moe": granite_moe,
    "dbrx": dbrx,
    "hunyuan-moe": hunyuan_moe,
}
