"""Layouts of the layers that architectures share, scaled so that every sub-layer moves the residual stream about as
much as the embedding does: routing is then diverse and greedy tokens do not settle on a repetition."""

from .recipe import LM_HEAD_GAIN, VOCAB, Layout, Normal

ROUTER_GAIN = 2.0
DOWN_GAIN = 3.0
GATED = ("gate_proj", "up_proj", "down_proj")


def linear(outputs: int, inputs: int, gain: float = 1.0) -> Normal:
    return Normal((outputs, inputs), gain * inputs**-0.5)


def norm(size: int) -> Normal:
    return Normal((size,), 0.1, mean=1.0)


def bias(size: int) -> Normal:
    return Normal((size,), 0.2)


def prefixed(prefix: str, layout: Layout) -> Layout:
    return {f"{prefix}.{name}": normal for name, normal in layout.items()}


def model_ends(hidden: int) -> Layout:
    return {
        "model.embed_tokens.weight": Normal((VOCAB, hidden), 1.0),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": linear(VOCAB, hidden, LM_HEAD_GAIN),
    }


def layer_norms(hidden: int) -> Layout:
    return {"input_layernorm.weight": norm(hidden), "post_attention_layernorm.weight": norm(hidden)}


def attention(hidden: int, heads: int, kv_heads: int, head_dim: int) -> Layout:
    return {
        "q_proj.weight": linear(heads * head_dim, hidden),
        "k_proj.weight": linear(kv_heads * head_dim, hidden),
        "v_proj.weight": linear(kv_heads * head_dim, hidden),
        "o_proj.weight": linear(hidden, heads * head_dim, 2.0),
    }


def gated_mlp(hidden: int, intermediate: int, names: tuple[str, str, str] = GATED) -> Layout:
    gate, up, down = names
    return {
        f"{gate}.weight": linear(intermediate, hidden),
        f"{up}.weight": linear(intermediate, hidden),
        f"{down}.weight": linear(hidden, intermediate, DOWN_GAIN),
    }


def experts(count: int, hidden: int, intermediate: int, names: tuple[str, str, str] = GATED) -> Layout:
    return {
        f"{index}.{name}": normal
        for index in range(count)
        for name, normal in gated_mlp(hidden, intermediate, names).items()
    }


def router(count: int, hidden: int) -> Normal:
    return linear(count, hidden, ROUTER_GAIN)
