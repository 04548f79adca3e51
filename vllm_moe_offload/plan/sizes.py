"""How many bytes of a model are experts, and how many are not: from headers of its files, or from its config.json."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError, UnsupportedError
from ..replay.hardware import ModelProfile
from .checkpoint import Checkpoint, StoredTensor
from .config_sizes import dense_bytes, expert_bytes
from .model_config import ModelConfig

_OF_EXPERTS = re.compile(r"\.experts\.(?:(\d+)\.)?")
_LAYER = re.compile(r"^(.*?\.|)(layers|blocks|h)\.(\d+)\.")
_KERNEL_WIDTH = 32
"""vLLM's kernels on CPUs pad the intermediate size of unquantized experts to a multiple of it."""


@dataclass(frozen=True)
class MoeLayer:
    """The routed experts of one layer."""

    name: str
    experts: int
    record_bytes: int
    """Of one expert, without padding to pages."""


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of one model, and what its time depends on besides."""

    layers: tuple[MoeLayer, ...]
    top_k: int
    dense_bytes: int
    """Everything that is no routed expert: in fast memory always."""
    dense_read_bytes: int
    """The part of it that every step reads: without an embedding table of which a step reads some rows."""
    draft_bytes: int
    """Layers for drafting (MTP): not loaded unless speculative decoding asks for them, and in no other figure here."""
    exact: bool
    """From the headers of its files; else computed from its configuration."""
    expert_parameters: int
    """Weights of one expert."""

    @property
    def experts(self) -> int:
        """In all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """In all layers."""
        return sum(layer.experts * layer.record_bytes for layer in self.layers)

    @property
    def record_bytes(self) -> int:
        """Of one expert; the mean where layers differ."""
        return self.expert_bytes // self.experts

    @property
    def shape(self) -> tuple[int, int, int]:
        """MoE layers, experts of each (the most, where layers differ), experts per token."""
        return len(self.layers), max(layer.experts for layer in self.layers), self.top_k

    def profile(self, more_read_bytes: int = 0) -> ModelProfile:
        """The model as replay sees it. ``more_read_bytes`` are read by every step besides: a KV cache."""
        dense = (self.dense_read_bytes + more_read_bytes) // len(self.layers)
        return ModelProfile(self.record_bytes, dense, self.expert_parameters)


def model_sizes(checkpoint: Checkpoint, on_cpu: bool) -> ModelSizes:
    """What ``checkpoint`` weighs.

    Args:
        on_cpu: whether its experts are laid out for vLLM's kernels on CPUs, which pad some.

    Raises:
        UnsupportedError: it has no routed experts.
        ConfigError: its configuration lacks what is needed.
    """
    config = ModelConfig(checkpoint.name, checkpoint.config)
    if checkpoint.tensors is None:
        return _from_config(config, on_cpu)
    return _from_headers(config, checkpoint.tensors, on_cpu)


def may_have_experts(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether any tensor looks like that of a routed expert, or of all experts of a layer."""
    return any(_OF_EXPERTS.search(name) or len(tensor.shape) == 3 for name, tensor in tensors.items())


def _from_config(config: ModelConfig, on_cpu: bool) -> ModelSizes:
    record = _padded(config, expert_bytes(config), on_cpu)
    layers = tuple(MoeLayer(f"layers.{layer}", config.experts, record) for layer in config.moe_layers)
    if not layers:
        raise UnsupportedError(f"MODEL {config.name}: none of its {config.layers} layers has routed experts")
    dense, table = dense_bytes(config)
    read = dense if config.is_tied else dense - table
    return ModelSizes(layers, config.top_k, dense, read, 0, False, _expert_parameters(config))


def _from_headers(config: ModelConfig, tensors: Mapping[str, StoredTensor], on_cpu: bool) -> ModelSizes:
    experts = config.experts
    of_layer: dict[str, int] = defaultdict(int)
    numbers: dict[str, set[int]] = defaultdict(set)
    dense = table = draft = 0
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        nbytes = _loaded_bytes(name, tensor, config)
        if _drafts(name, config.layers):
            draft += nbytes
        elif layer and (number := _expert_of(name, tensor, experts)) is not None:
            of_layer[layer[0]] += nbytes + (_added_on_cpu(name, tensor, config) if on_cpu else 0)
            numbers[layer[0]].update([number] if number >= 0 else range(experts))
        else:
            dense += nbytes
            table += nbytes if re.search(r"(embed_tokens|wte|word_embeddings)\.weight$", name) else 0
    if not of_layer:
        raise UnsupportedError(f"MODEL {config.name}: none of the tensors in its files is a routed expert's")
    layers = []
    for name, nbytes in sorted(of_layer.items(), key=lambda item: int(_LAYER.match(item[0])[3])):  # type: ignore[index]
        count = len(numbers[name])
        if count < config.top_k:
            raise ConfigError(
                f"MODEL {config.name}: its files hold {count} experts of {name.rstrip('.')}, and a token needs "
                f"{config.top_k}; download it again"
            )
        layers.append(MoeLayer(name.rstrip("."), count, _padded(config, nbytes // count, on_cpu)))
    read = dense if config.is_tied else dense - table
    return ModelSizes(tuple(layers), config.top_k, dense, read, draft, True, _expert_parameters(config))


def _drafts(name: str, layers: int) -> bool:
    """Whether a tensor belongs to layers behind the last one, which predict further tokens (MTP)."""
    layer = _LAYER.match(name)
    of_decoder = layer is not None and not re.search("vis|audio|encoder", layer[1])
    return name.startswith("mtp.") or (of_decoder and layer is not None and int(layer[3]) >= layers)


def _expert_of(name: str, tensor: StoredTensor, experts: int) -> int | None:
    """Which routed expert a tensor belongs to: its number, -1 for all of its layer, None for no expert."""
    if match := _OF_EXPERTS.search(name):
        return -1 if match[1] is None else int(match[1])
    return -1 if len(tensor.shape) == 3 and tensor.shape[0] == experts else None


def _loaded_bytes(name: str, tensor: StoredTensor, config: ModelConfig) -> int:
    """Bytes in memory: matrices that are stored in 32 bits are loaded in 16."""
    wide = tensor.dtype == "F32" and len(tensor.shape) >= 2 and "scale" not in name and not config.quantization
    return tensor.elements * config.number_bytes if wide else tensor.nbytes


def _added_on_cpu(name: str, tensor: StoredTensor, config: ModelConfig) -> int:
    """What vLLM's kernels on CPUs add to an expert's tensor: sums of int8 rows, and biases of MXFP4 in 32 bits."""
    if tensor.dtype == "I8" and len(tensor.shape) == 2:
        return 4 * tensor.shape[0]
    if config.quantization.get("quant_method") == "mxfp4" and name.endswith("_bias"):
        return 4 * tensor.elements - tensor.nbytes
    return 0


def _expert_parameters(config: ModelConfig) -> int:
    return 3 * config.hidden * config.expert_width


def _padded(config: ModelConfig, record: int, on_cpu: bool) -> int:
    if not on_cpu or config.quantization or config.expert_width % _KERNEL_WIDTH == 0:
        return record
    width = config.expert_width
    return record * (-(-width // _KERNEL_WIDTH) * _KERNEL_WIDTH) // width
