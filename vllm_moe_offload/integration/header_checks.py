"""What the headers of a checkpoint's files refuse before any worker starts: a dense model, and too small a ``cache``.

Only what is certain is refused here. Workers, which know what kernels make of the weights, refuse the rest.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from vllm.platforms import current_platform

from ..cache.sizing import LayoutNeeds, slots_for_budget
from ..client.joining import socket_of
from ..config import OffloadConfig
from ..errors import OffloadError, UnsupportedError
from ..plan.checkpoint import CONFIG, Checkpoint, read_folder
from ..plan.sizes import ModelSizes, may_have_experts, model_sizes
from ..windows.sizes import WindowNeeds, bytes_of_everything, plans_for_budget


def refuse_by_headers(vllm_config: Any, config: OffloadConfig, serves: bool) -> None:
    """Refuse what cannot be offloaded with these settings, as far as the checkpoint lies here as safetensors files.

    Args:
        serves: whether workers will take slots; they do not where only stores are built.

    Raises:
        UnsupportedError: the model is dense.
        ConfigError: the budget cannot hold the experts of one token; names the smallest that works.
    """
    model = vllm_config.model_config
    checkpoint = _checkpoint(model.model, model.revision)
    if checkpoint is None or checkpoint.tensors is None or vllm_config.speculative_config is not None:
        return
    if not model.is_moe and not may_have_experts(checkpoint.tensors):
        raise no_moe_layers(model.model)
    parallel = vllm_config.parallel_config
    exact = model.quantization is None and parallel.pipeline_parallel_size == 1
    if serves and exact and not _uses_daemon(config):
        try:
            sizes = model_sizes(checkpoint, current_platform.is_cpu())
        except OffloadError:  # of a kind that only vLLM can read
            return
        refuse_small_budget(config, sizes, parallel, current_platform.is_cpu())


def no_moe_layers(model: str) -> UnsupportedError:
    return UnsupportedError(
        f"moe-offload is on, but {model} has no MoE layers it could offload; switch moe-offload off for this model"
    )


def refuse_small_budget(config: OffloadConfig, sizes: ModelSizes, parallel: Any, on_cpu: bool) -> None:
    """Refuse a budget that is too small on every rank.

    Args:
        sizes: of an unquantized model, whose records are no smaller than what its files hold of an expert.
        parallel: vLLM's configuration of it, without pipeline stages.

    Raises:
        ConfigError: naming the smallest budget that works.
    """
    ranks = parallel.tensor_parallel_size
    split, copies = (1, ranks) if parallel.enable_expert_parallel else (ranks, 1)
    counts: dict[int, list[int]] = defaultdict(list)
    for layer in sizes.layers:
        counts[layer.record_bytes // split].append(layer.experts // copies)
    if on_cpu:
        _fit_pools(config, counts, sizes.top_k)
    else:
        _fit_windows(config, counts, sizes.top_k)


def _fit_pools(config: OffloadConfig, counts: Mapping[int, Sequence[int]], top_k: int) -> None:
    """Raises ``ConfigError`` where pools of host memory cannot have the slots of one token.

    Args:
        counts: experts of each layer, by bytes of one.
    """
    needs = {
        record: LayoutNeeds(record, sum(layers), max(min(top_k, layer) for layer in layers))
        for record, layers in counts.items()
    }
    budget = config.budget.given(sum(need.total_bytes for need in needs.values()))
    if budget is not None:
        slots_for_budget(needs, budget, f"cache = {config.cache!r}")


def _fit_windows(config: OffloadConfig, counts: Mapping[int, Sequence[int]], top_k: int) -> None:
    """The same of windows in the memory of a GPU, of which every layer has one."""
    needs = {
        record: WindowNeeds(
            (record,), tuple(layers), tuple(min(top_k, layer) for layer in layers), (1.0,) * len(layers)
        )
        for record, layers in counts.items()
    }
    budget = config.budget.given(bytes_of_everything(needs))
    if budget is not None:
        plans_for_budget(needs, budget, repr(config.cache))


def _checkpoint(model: str, revision: str | None) -> Checkpoint | None:
    """What lies of a model on this machine; None where it cannot be read, which is for vLLM to say."""
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, CONFIG, revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return read_folder(folder)
    except OffloadError:
        return None


def _uses_daemon(config: OffloadConfig) -> bool:
    """Whether a daemon may keep the slots, and with it decide how few are enough."""
    if config.daemon == "off":
        return False
    try:
        return config.daemon not in ("auto", "start") or socket_of(config.daemon).exists()
    except OffloadError:
        return False
