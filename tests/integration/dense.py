"""A tiny model without experts."""

from tests.models.layers import attention, gated_mlp, layer_norms, model_ends, prefixed
from tests.models.recipe import VOCAB, Recipe


def dense_llama() -> Recipe:
    hidden, layers, heads, head_dim = 64, 2, 2, 32
    layer = {
        **layer_norms(hidden),
        **prefixed("self_attn", attention(hidden, heads, heads, head_dim)),
        **prefixed("mlp", gated_mlp(hidden, 128)),
    }
    tensors = {
        f"model.layers.{index}.{name}": normal for index in range(layers) for name, normal in layer.items()
    } | model_ends(hidden)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return Recipe(config, tensors, routed_layers=0, experts=0, top_k=0, notes="no experts at all")
