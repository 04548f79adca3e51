"""A GPU's memory: how much of it ``auto`` makes slots, and what to say if they leave no room for the KV cache.

Slots are allocated while the model is loaded, so vLLM itself counts them before it sizes the KV cache by what is left.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.config import CUDAGraphMode

from ...errors import ConfigError
from ...sizes import size_text
from ...windows.activations import estimated_activations
from .. import seams
from ..start_errors import leaving_errors
from .graphs import kept_bytes

SEQUENCES = 8
"""``auto`` leaves room for the KV cache of so many of the longest sequences, if it can; of one it must."""

MARGIN = 0.03
"""Of the memory that vLLM may use: allocators' leftovers, and what the estimate of activations does not know."""


class DeviceMemory(NamedTuple):
    """Bytes of a GPU's memory when everything but experts is loaded."""

    requested: int
    """What vLLM may use in all."""
    used: int
    activations: int
    """Estimated: of the largest step, while it runs."""
    sequence: int
    """The KV cache of one sequence of the greatest length."""


class AutomaticSlots(NamedTuple):
    nbytes: int
    sequences: int
    """Of the greatest length, for whose KV cache there is room besides."""


def automatic_slots(memory: DeviceMemory, sequences: int, least: int, most: int) -> AutomaticSlots:
    """How much memory slots get where ``cache`` is ``auto``: what is left beside everything else.

    Args:
        sequences: for whose KV cache room is left, if the least slots allow it.
        least: bytes of slots with which a step can run.
        most: bytes of slots for all experts.

    Raises:
        ConfigError: there is no room for the least slots and one sequence.
    """
    assert 0 < least <= most and sequences >= 1
    room = memory.requested - memory.used - memory.activations
    if room < least + memory.sequence:
        raise ConfigError(
            f"cache = 'auto' finds no room for experts on this GPU: {_terms(memory, 1)} leave "
            f"{size_text(max(0, room - memory.sequence))}, and the smallest slots take {size_text(least)}; lower "
            "--max-model-len or --max-num-batched-tokens, or raise --gpu-memory-utilization"
        )
    if memory.sequence:
        sequences = min(sequences, (room - least) // memory.sequence)
    return AutomaticSlots(min(room - sequences * memory.sequence, most), sequences)


def automatic_reason(memory: DeviceMemory, sequences: int) -> str:
    """How ``auto`` came to its slots, to stand behind the setting in the log."""
    return f" (auto: {_terms(memory, sequences)})"


def _terms(memory: DeviceMemory, sequences: int) -> str:
    plural = "" if sequences == 1 else f"s of {sequences} sequences"
    return (
        f"of {size_text(memory.requested)}, {size_text(memory.used)} used, {size_text(memory.activations)} for "
        f"activations, {size_text(sequences * memory.sequence)} for the KV cache{plural}"
    )


def device_memory(worker: Any, layer: torch.nn.Module) -> DeviceMemory:
    """What vLLM's worker has, wants and will need.

    Args:
        worker: has loaded its models; no slots are allocated yet.
        layer: a MoE layer of the served model.
    """
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(worker.device)
    config, moe = worker.vllm_config, layer.moe_config
    compilation, element = config.compilation_config, torch.empty(0, dtype=config.model_config.dtype).element_size()
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    kept = kept_bytes(compilation.max_cudagraph_capture_size or 0, moe.hidden_dim * element) if graphs else 0
    activations = kept + estimated_activations(
        config.scheduler_config.max_num_batched_tokens,
        config.scheduler_config.max_num_seqs,
        moe.hidden_dim,
        moe.intermediate_size_per_partition,
        moe.experts_per_token,
        config.model_config.get_vocab_size(),
        element,
        graphs,
    )
    requested = int(worker.requested_memory)
    fixed = worker.cache_config.kv_cache_memory_bytes
    return DeviceMemory(
        requested,
        worker.init_snapshot.free_memory - free + int(requested * MARGIN),
        activations,
        kv_cache_of_a_sequence(worker) if fixed is None else fixed,
    )


def wanted_sequences(worker: Any) -> int:
    """For how many sequences ``auto`` leaves room; a KV cache of a given size counts as one."""
    fixed = worker.cache_config.kv_cache_memory_bytes is not None
    return 1 if fixed else min(worker.vllm_config.scheduler_config.max_num_seqs, SEQUENCES)


def kv_cache_of_a_sequence(worker: Any) -> int:
    """Bytes of KV cache that one sequence of the greatest length takes on this worker."""
    specifications = worker.get_kv_cache_spec().values()
    return sum(int(of_layer.max_memory_usage_bytes(worker.vllm_config)) for of_layer in specifications)


def refuse_without_kv_cache(available: int, needed: int, slots: int, least: int) -> None:
    """Refuse slots that leave too little memory for the KV cache of one sequence.

    Args:
        available: bytes that vLLM finds for its KV cache.
        needed: bytes of one sequence of the greatest length.
        slots: bytes that were allocated for experts.
        least: bytes of the smallest slots.

    Raises:
        ConfigError: naming the largest cache that leaves room, or that none does.
    """
    if available >= needed:
        return
    fits = (slots - (needed - available)) >> 20
    said = (
        f"the experts' slots take {size_text(slots)} of this GPU's memory and leave {size_text(max(0, available))} for "
        f"the KV cache, of which one sequence of --max-model-len needs {size_text(needed)}"
    )
    if fits << 20 < least:
        raise ConfigError(
            f"{said}; even the smallest slots ({size_text(least)}) leave too little: lower --max-model-len or "
            "--max-num-batched-tokens, or raise --gpu-memory-utilization"
        )
    raise ConfigError(
        f"{said}; cache = '{fits}MiB' would leave enough, as would a lower --max-model-len or a higher "
        "--gpu-memory-utilization"
    )


def install() -> None:
    seams.GPU_MEMORY.wrap(_explain_missing_kv_cache)


def _explain_missing_kv_cache(determine_available_memory: Callable[..., int]) -> Callable[..., int]:
    def determine(self: Any) -> int:
        available = determine_available_memory(self)
        offload = getattr(self, "moe_offload", None)
        given = self.cache_config.kv_cache_memory_bytes is not None or self.model_config.original_max_model_len == -1
        if offload is not None and offload.device_slots is not None and not given:
            with leaving_errors(self.vllm_config):
                refuse_without_kv_cache(available, kv_cache_of_a_sequence(self), *offload.device_slots)
        return available

    return determine
