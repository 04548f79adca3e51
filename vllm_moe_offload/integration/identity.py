"""The facts that make a store this model's, this vLLM's and this machine's.

What identifies a checkpoint, and what a store depends on besides, is said in ``store/identity.py``.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from transformers import PretrainedConfig
from vllm.distributed import (
    get_ep_group,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.platforms import current_platform

from ..errors import StoreError
from ..store.checkpoint import FileDigests
from ..store.identity import StoreIdentity, digest
from ..store.manifest import FORMAT_VERSION
from ..store.root import StoreRoot
from .cuda.allow_list import OWN_LAYOUT
from .method import OffloadedLayers, OffloadedMoEMethod

COPIED_TO_MEMORY = ("eager", "torchao")
"""Values of ``--safetensors-load-strategy`` with which tensors are no views of mapped files."""

_QUANTIZATION_FILES = ("quant*_config.json", "hf_quant_config.json")
_INSTALLED = frozenset({"transformers_version", "_name_or_path", "name_or_path", "_commit_hash"})
"""Names in a configuration that say who wrote it or where it lies."""
_CHOOSING = ("VLLM_CPU_INT4_W4A8",)
"""Environment variables by which vLLM's CPU kernels choose how they keep weights."""
_CHOOSING_ON_GPU = ("VLLM_MARLIN_INPUT_DTYPE", "VLLM_ROCM_MOE_PADDING", "VLLM_ROCM_FP8_PADDING")
"""Those by which kernels for GPUs do."""


@dataclass(frozen=True)
class CheckpointRead:
    """What vLLM's loader is going to read of a checkpoint."""

    folder: Path
    """Where the model itself is on this machine."""
    files: Mapping[str, Path]
    """Weight files by name; those of a further source (see ``secondary_weights``) after its number."""
    configuration: str
    """Digest of the configuration as it is written, with what was overridden."""
    mapped: bool
    """Tensors are views of mapped files."""

    def facts(self, root: StoreRoot) -> dict[str, Any]:
        """Content and configuration, as facts of a store's identity.

        Raises:
            StoreError: a file cannot be read.
        """
        digests = FileDigests(root.path).of(list(self.files.values()))
        return {"checkpoint": dict(zip(self.files, digests, strict=True)), "model": self.configuration}


def checkpoint_read(loader: Any, model: torch.nn.Module, model_config: Any) -> CheckpointRead:
    """Ask vLLM's loader which files it is going to read, as its ``get_all_weights`` does.

    Whatever decides that decides here too: ``--load-format``, revision, download folder, ModelScope, an index, what
    the model's class prefers.
    """
    first = loader.Source(
        model_config.model,
        model_config.revision,
        fall_back_to_pt=getattr(model, "fall_back_to_pt_during_load", True),
        allow_patterns_overrides=getattr(model, "allow_patterns_overrides", None),
    )
    folders, files = [], {}
    for number, source in enumerate([first, *getattr(model, "secondary_weights", ())]):
        folder, paths, _, _ = loader._prepare_weights(
            source.model_or_path,
            source.subfolder,
            source.revision,
            source.fall_back_to_pt,
            source.allow_patterns_overrides,
        )
        folders.append(Path(folder).absolute())
        for path in sorted(map(Path, paths)):
            name = path.relative_to(folder).as_posix()
            files[f"{number}/{name}" if number else name] = path
    strategy = loader.load_config.safetensors_load_strategy
    mapped = strategy not in COPIED_TO_MEMORY and all(path.suffix == ".safetensors" for path in files.values())
    return CheckpointRead(folders[0], files, _configuration(model_config, folders[0]), mapped)


def store_identity(
    vllm_config: Any,
    model_config: Any,
    model: torch.nn.Module,
    layers: OffloadedLayers,
    checkpoint: Mapping[str, Any],
    folder: Path,
) -> StoreIdentity:
    """Identity of the store this worker needs.

    Args:
        model_config: of the model being loaded: a drafter's is not that of ``vllm_config``.
        model: made, but not loaded.
        layers: its MoE layers by their names in the store, with parameters as vLLM loads them.
        checkpoint: facts of the checkpoint.
        folder: where it is.
    """
    _, method = next(iter(layers.values()))
    expert_parallel = vllm_config.parallel_config.enable_expert_parallel
    facts = {
        "format": FORMAT_VERSION,
        **checkpoint,
        "architecture": type(model).__name__,
        "layers": digest([_layer_facts(name, layer, method) for name, (layer, method) in layers.items()]),
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "quantization": str(model_config.quantization),
        "quantization_arguments": digest(_plain(model_config.quantization_config)),
        "method": type(method.real).__name__,
        "kernel": _kernel(method),
        "backend": str(vllm_config.kernel_config.moe_backend),
        **machine_facts(_kernel(method)),
        "dtype": str(model_config.dtype),
        "tensor_parallel": [get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()],
        "pipeline_parallel": [get_pp_group().rank_in_group, get_pp_group().world_size],
        "expert_parallel": [get_ep_group().rank_in_group, get_ep_group().world_size] if expert_parallel else [0, 1],
        "placement": str(vllm_config.parallel_config.expert_placement_strategy),
    }
    return StoreIdentity(facts, str(folder))


def machine_facts(kernel: str) -> dict[str, Any]:
    """What the bytes of a record depend on of the machine, given the class of the kernel that reads them.

    Records of kernels that read weights as checkpoints have them serve on every GPU of CUDA's.
    """
    if current_platform.is_cpu():
        return {
            "platform": str(current_platform.device_type),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "amx": bool(torch.cpu._is_amx_tile_supported()),
            "environment": {name: os.environ.get(name) for name in _CHOOSING},
        }
    facts: dict[str, Any] = {"platform": str(current_platform.device_name)}
    if kernel not in OWN_LAYOUT or current_platform.is_rocm():
        facts["capability"] = list(current_platform.get_device_capability() or ())
        facts["environment"] = {name: os.environ.get(name) for name in _CHOOSING_ON_GPU}
    return facts


def _kernel(method: OffloadedMoEMethod) -> str:
    return getattr(getattr(method.real, "experts_cls", None), "__name__", "?")


def _layer_facts(name: str, layer: torch.nn.Module, method: OffloadedMoEMethod) -> list[Any]:
    """How a layer takes in weights: by which class and kernel, into which tensors, for which experts."""
    tensors = {key: [str(value.dtype), list(value.shape)] for key, value in layer.named_parameters(recurse=False)}
    experts = None if layer._expert_map is None else layer._expert_map.tolist()
    return [name, type(layer).__name__, type(method.real).__name__, _kernel(method), tensors, experts]


def _configuration(model_config: Any, folder: Path) -> str:
    """Digest of the configuration as written in files, whatever transformers is installed, and of what overrides it."""
    overrides = model_config.hf_overrides
    if getattr(overrides, "__module__", "").startswith("vllm."):
        overrides = {}  # vLLM's own, for drafters: what it changes shows in the model's class and layers
    written = None if callable(overrides) else _written_configuration(model_config, folder)
    files = [path for pattern in (*_QUANTIZATION_FILES, "params.json") for path in folder.glob(pattern)]
    return digest(
        {
            "configuration": _cleaned(_plain(model_config.hf_config.to_dict() if written is None else written)),
            "overrides": None if callable(overrides) else _plain(overrides),
            "files": {path.name: _cleaned(_json_of(path)) for path in sorted(files)},
        }
    )


def _written_configuration(model_config: Any, folder: Path) -> dict[str, Any] | None:
    """What config.json says; None if it is not to be had as written."""
    place = model_config.hf_config_path or str(folder)
    revision = None if place == str(folder) else model_config.revision
    try:
        written, _ = PretrainedConfig.get_config_dict(place, revision=revision, local_files_only=True)
    except OSError:
        return None
    return dict(written)


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read the checkpoint's {path}: {error}") from error


def _plain(value: Any) -> Any:
    """As JSON has it; what JSON does not know by its text."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(part) for name, part in value.items() if name not in _INSTALLED}
    return [_cleaned(part) for part in value] if isinstance(value, list) else value
