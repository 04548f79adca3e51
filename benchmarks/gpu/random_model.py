"""A MoE checkpoint of a real model's layer shape with random weights, so that speed can be measured without the model.

    python benchmarks/gpu/random_model.py /tmp/models/qwen3-bf16 --shape qwen3-30b-a3b --format bf16 --layers 12

Made on the GPU where there is one. Fewer layers than the model has keep every ratio per layer. Routing of random
weights is close to uniform: harder for a cache than that of a real model.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

FORMATS = ("bf16", "fp8")
_BLOCK = 128
_VOCABULARY = 8192
_MOST_FP8 = 448.0


class Shape(NamedTuple):
    """A layer of a Qwen3 MoE model, and how many the model has."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_width: int
    heads: int
    kv_heads: int
    head_size: int

    def expert_bytes(self, fmt: str) -> int:
        """One expert: three projections, and the scales of their blocks."""
        weights = 3 * self.hidden * self.expert_width
        return 2 * weights if fmt == "bf16" else weights + 4 * weights // _BLOCK**2


SHAPES = {
    "tiny": Shape(2, 256, 8, 2, 128, 4, 2, 64),
    "gpt-oss-20b": Shape(24, 2880, 32, 4, 2880, 64, 8, 64),
    "qwen3-30b-a3b": Shape(48, 2048, 128, 8, 768, 32, 4, 128),
}
"""``gpt-oss-20b`` has that model's sizes in Qwen3's architecture, without biases and sinks, and not in MXFP4."""


class Checkpoint:
    """Writes one file per layer, so that memory stays at one layer."""

    def __init__(self, folder: Path, shape: Shape, fmt: str, seed: int = 7):
        assert fmt in FORMATS
        self._folder, self._shape, self._format = folder, shape, fmt
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator = torch.Generator(device=self._device).manual_seed(seed)
        self._index: dict[str, str] = {}
        self._bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self) -> int:
        """All files; returns their bytes."""
        shape = self._shape
        self._save("model-dense", dict(self._dense()))
        for layer in range(shape.layers):
            prefix = f"model.layers.{layer}."
            self._save(f"model-{layer:02}", dict(self._attention(prefix)) | dict(self._experts(prefix)))
        index = {"metadata": {"total_size": self._bytes}, "weight_map": self._index}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (self._folder / "config.json").write_text(json.dumps(self._config(), indent=1))
        return self._bytes

    def _dense(self) -> Iterator[tuple[str, torch.Tensor]]:
        hidden = self._shape.hidden
        yield "model.embed_tokens.weight", self._random(_VOCABULARY, hidden) * 4
        yield "lm_head.weight", self._random(_VOCABULARY, hidden)
        yield "model.norm.weight", _ones(hidden)

    def _attention(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, head = self._shape.hidden, self._shape.head_size
        query, key = self._shape.heads * head, self._shape.kv_heads * head
        for name, rows, columns in (("q", query, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, query)):
            yield from self._linear(f"{prefix}self_attn.{name}_proj", self._random(rows, columns))
        for name, size in (("self_attn.q_norm", head), ("self_attn.k_norm", head)):
            yield f"{prefix}{name}.weight", _ones(size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", _ones(hidden)
        yield f"{prefix}mlp.gate.weight", self._random(self._shape.experts, hidden)

    def _experts(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, width = self._shape.hidden, self._shape.expert_width
        for name, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            for expert in range(self._shape.experts):
                yield from self._linear(f"{prefix}mlp.experts.{expert}.{name}_proj", self._random(rows, columns))

    def _linear(self, name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if self._format == "bf16":
            yield f"{name}.weight", weight
            return
        rows, columns = (-(-size // _BLOCK) for size in weight.shape)
        scale = weight.abs().max().float() / _MOST_FP8
        yield f"{name}.weight", (weight.float() / scale).to(torch.float8_e4m3fn)
        yield f"{name}.weight_scale_inv", scale.expand(rows, columns).clone()

    def _random(self, rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=self._generator, device=self._device, dtype=torch.bfloat16)
        return drawn * columns**-0.5

    def _save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        on_host = {key: tensor.cpu() for key, tensor in tensors.items()}
        save_file(on_host, str(self._folder / f"{name}.safetensors"), metadata={"format": "pt"})
        self._index |= dict.fromkeys(on_host, f"{name}.safetensors")
        self._bytes += sum(tensor.nbytes for tensor in on_host.values())

    def _config(self) -> dict[str, object]:
        shape = self._shape
        config: dict[str, object] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": _VOCABULARY,
            "hidden_size": shape.hidden,
            "intermediate_size": 3 * shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_size,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": shape.expert_width,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }
        if self._format == "fp8":
            blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
            config["quantization_config"] = blocks | {"modules_to_not_convert": ["lm_head", "mlp.gate"]}
        return config


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def make(folder: Path, shape_name: str, fmt: str, layers: int | None) -> Shape:
    """The checkpoint in ``folder``, made unless it is there; returns its shape."""
    whole = SHAPES[shape_name]
    shape = whole._replace(layers=layers or whole.layers)
    if not (folder / "config.json").exists():
        began = time.perf_counter()
        size = Checkpoint(folder, shape, fmt).write()
        print(f"{folder}: {size / 2**30:.1f} GiB made in {time.perf_counter() - began:.0f} s", flush=True)
    return shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--format", choices=FORMATS, default="bf16")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    options = parser.parse_args()
    make(options.folder, options.shape, options.format, options.layers)


if __name__ == "__main__":
    main()
