"""The facts that make a store this model's, this vLLM's and this machine's."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.distributed import (
    get_ep_group,
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.platforms import current_platform

from ..errors import StoreError
from ..store.identity import StoreIdentity, checkpoint_identity
from ..store.manifest import FORMAT_VERSION


def store_identity(vllm_config: Any, model_config: Any, load_config: Any, method: Any) -> StoreIdentity:
    """Identity of the store this worker needs.

    Args:
        model_config: of the model being loaded: a drafter's is not that of ``vllm_config``.
        load_config: of its loader.
        method: the quantization method of the first MoE layer, which stands for the kernel chosen on this machine.

    Raises:
        StoreError: the checkpoint has no weight files this can identify.
    """
    folder = checkpoint_folder(model_config, load_config)
    expert_parallel = vllm_config.parallel_config.enable_expert_parallel
    facts = {
        "format": FORMAT_VERSION,
        "checkpoint": checkpoint_identity(folder),
        "model": _digest(model_config.hf_config.to_dict()),
        "vllm": vllm.__version__,
        "torch": str(torch.__version__),
        "quantization": str(model_config.quantization),
        "method": type(method).__name__,
        "kernel": getattr(getattr(method, "experts_cls", None), "__name__", "?"),
        "backend": str(vllm_config.kernel_config.moe_backend),
        "platform": str(current_platform.device_type),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "dtype": str(model_config.dtype),
        "tensor_parallel": [get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()],
        "pipeline_parallel": [get_pp_group().rank_in_group, get_pp_group().world_size],
        "expert_parallel": [get_ep_group().rank_in_group, get_ep_group().world_size] if expert_parallel else [0, 1],
        "placement": str(vllm_config.parallel_config.expert_placement_strategy),
    }
    return StoreIdentity(facts, str(folder))


def checkpoint_folder(model_config: Any, load_config: Any) -> Path:
    """Where the checkpoint's files are on this machine.

    Raises:
        StoreError: it is not a folder and not in the local hub cache.
    """
    local = Path(model_config.model)
    if local.is_dir():
        return local.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=load_config.download_dir,
            local_files_only=True,
        )
    except LocalEntryNotFoundError as error:
        raise StoreError(
            f"the checkpoint {model_config.model} is neither a folder nor in the local hub cache"
        ) from error
    return Path(found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
