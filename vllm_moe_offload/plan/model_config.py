"""A config.json read by what it means: models spell the same thing differently, and some nest it."""

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError, UnsupportedError

_NESTED = ("text_config", "language_config", "llm_config", "ffn_config", "attn_config")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)
_WIDTH = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float": 4, "half": 2}


class ModelConfig:
    """What a model's configuration says.

    Args:
        name: of the model, for errors.

    Raises:
        ConfigError: on use, where something that is needed is missing or no number.
    """

    def __init__(self, name: str, config: Mapping[str, Any]):
        self.name = name
        self.values: dict[str, Any] = dict(config)
        for key in _NESTED:
            if isinstance(inner := config.get(key), Mapping):
                self.values |= {name: value for name, value in inner.items() if value is not None}

    def integer(self, *keys: str, default: int | None = None) -> int:
        """The first of ``keys`` that has a value; of a list its largest entry."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, list) and value:
                value = max(value)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return int(value)
            if value is not None and not isinstance(value, bool | list):
                raise ConfigError(f"MODEL {self.name}: {key} is {value!r} in its config.json, not a number")
        if default is None:
            raise ConfigError(f"MODEL {self.name}: its config.json has no {' or '.join(keys)}")
        return default

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else str(self.values.get("model_type"))

    @property
    def layers(self) -> int:
        return self.integer("num_hidden_layers", "n_layers", "num_layers")

    @property
    def hidden(self) -> int:
        return self.integer("hidden_size", "d_model")

    @property
    def experts(self) -> int:
        """Routed experts of each layer.

        Raises:
            UnsupportedError: the model has none.
        """
        count = self.integer(*_EXPERTS, default=0)
        if count < 2:
            raise UnsupportedError(
                f"MODEL {self.name}: {self.architecture} has no routed experts in its config.json; a dense model has "
                "nothing to offload, serve it with plain vLLM"
            )
        return count

    @property
    def top_k(self) -> int:
        return min(self.integer(*_TOP_K), self.experts)

    @property
    def expert_width(self) -> int:
        """Intermediate size of one routed expert."""
        return self.integer(*_WIDTH)

    @property
    def heads(self) -> int:
        return self.integer("num_attention_heads", "n_heads")

    @property
    def kv_heads(self) -> int:
        return self.integer("num_key_value_heads", "kv_n_heads", default=self.heads)

    @property
    def head_dim(self) -> int:
        return self.integer("head_dim", default=self.hidden // self.heads)

    @property
    def number_bytes(self) -> int:
        """Of an unquantized weight, as vLLM loads it: float32 becomes two bytes."""
        return min(2, _BYTES.get(str(self.values.get("dtype") or self.values.get("torch_dtype")), 2))

    @property
    def is_tied(self) -> bool:
        """Whether the output projection is the embedding table."""
        return bool(self.values.get("tie_word_embeddings", False))

    @property
    def quantization(self) -> Mapping[str, Any]:
        found = self.values.get("quantization_config") or self.values.get("compression_config")
        return found if isinstance(found, Mapping) else {}

    @property
    def moe_layers(self) -> list[int]:
        """Which layers have routed experts."""
        return [layer for layer in range(self.layers) if self._is_moe(layer)]

    def _is_moe(self, layer: int) -> bool:
        values = self.values
        named = values.get("moe_layers")
        if isinstance(named, list):
            return layer in named
        if layer in (values.get("mlp_only_layers") or ()):
            return False
        frequency = values.get("moe_layer_freq", 1)
        if isinstance(frequency, list):
            return bool(frequency[layer]) if layer < len(frequency) else True
        if "expert_layer_period" in values:
            return layer % self.integer("expert_layer_period") == self.integer("expert_layer_offset", default=0)
        first = self.integer("first_k_dense_replace", "moe_layer_start_index", default=0)
        last = self.integer("moe_layer_end_index", default=-1)
        if layer < first or (last >= 0 and layer > last):
            return False
        if layer % max(1, int(frequency or 1)):
            return False
        step = self.integer("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval", default=1)
        return (layer + 1) % max(1, step) == 0
