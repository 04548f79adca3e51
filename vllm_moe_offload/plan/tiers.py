"""What lies where: dense weights, KV cache and slots in fast memory, all experts behind it, on disk what is left."""

import msgspec

from ..errors import ConfigError
from ..sizes import size_text
from ..windows.activations import estimated_activations
from ..windows.plan import rounded
from ..windows.sizes import WindowNeeds, plans_for_budget
from .model_config import ModelConfig
from .sizes import ModelSizes

GPU_SHARE = 0.92
"""Of a GPU's memory that vLLM uses unless told otherwise."""
CPU_SHARE = 0.9
"""Of free host memory that the plugin makes slots and KV cache at most."""
HOST_SHARE = 0.9
PROCESS_BYTES = 1280 << 20
"""Of host memory: vLLM's processes without a model."""
_BATCHED_TOKENS = 8192
"""Of one step; what vLLM's server takes by itself on large GPUs, and more than on others."""


class Tiers(msgspec.Struct, frozen=True):
    """Bytes by where they lie. Fast memory is a GPU's, or host memory where experts are computed on the CPU."""

    fast_name: str
    """``VRAM`` or ``RAM``."""
    fast_bytes: int
    """That there is, or that was named."""
    usable_bytes: int
    """What vLLM takes of it."""
    dense_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    """Activations, captured graphs, or vLLM's processes."""
    room_bytes: int
    """What is left for slots; may be below zero."""
    slots: int
    """That fit there, at most one per expert; 0 where not even those of one token do."""
    host_bytes: int
    """Host memory behind a GPU for experts; 0 without a GPU."""
    experts_in_host_bytes: int
    """Of all experts, what host memory behind a GPU holds."""
    experts_on_disk_bytes: int
    """What is read from the disk while serving: what fits into no memory."""


class Memory(msgspec.Struct, frozen=True):
    """What there is."""

    fast_bytes: int
    host_bytes: int
    """Behind a GPU."""
    is_gpu: bool


def tiers(sizes: ModelSizes, config: ModelConfig, memory: Memory, kv_cache_bytes: int) -> Tiers:
    """Lay a model out over ``memory``; ``kv_cache_bytes`` are those of all sequences together."""
    usable = int(memory.fast_bytes * (GPU_SHARE if memory.is_gpu else CPU_SHARE))
    working = _activations(config) if memory.is_gpu else PROCESS_BYTES
    room = usable - sizes.dense_bytes - kv_cache_bytes - working
    slots = slots_in(sizes, room, memory.is_gpu)
    host = int(memory.host_bytes * HOST_SHARE) if memory.is_gpu else 0
    in_host = min(host, sizes.expert_bytes)
    held = in_host if memory.is_gpu else slots * sizes.record_bytes
    everything_fits = slots == sizes.experts
    return Tiers(
        "VRAM" if memory.is_gpu else "RAM",
        memory.fast_bytes,
        usable,
        sizes.dense_bytes,
        kv_cache_bytes,
        working,
        room,
        slots,
        host,
        0 if everything_fits else in_host,
        0 if everything_fits else max(0, sizes.expert_bytes - held),
    )


def slots_in(sizes: ModelSizes, room: int, is_gpu: bool) -> int:
    """How many slots ``room`` bytes hold; 0 where they do not hold the experts of one token."""
    if not is_gpu:
        slots = min(sizes.experts, max(0, room) // sizes.record_bytes)
        return slots if slots >= fewest_slots(sizes, False) else 0
    try:
        (plan,) = plans_for_budget({"all": _needs(sizes)}, max(0, room), "auto").values()
    except ConfigError:
        return 0
    return sum(plan.slots)


def slot_bytes(sizes: ModelSizes, slots: int, is_gpu: bool) -> int:
    """Fast memory that ``slots`` take."""
    if not is_gpu:
        return slots * sizes.record_bytes
    needs = _needs(sizes)
    few, more = divmod(slots, len(sizes.layers))
    plan = needs.plan([min(layer.experts, few + (n < more)) for n, layer in enumerate(sizes.layers)])
    return plan.nbytes(needs.row_bytes)


def fewest_slots(sizes: ModelSizes, is_gpu: bool) -> int:
    """With fewer no token can be computed: windows are per layer, a pool of host memory is shared by all layers."""
    return sizes.top_k * len(sizes.layers) if is_gpu else sizes.top_k


def without_offloading(sizes: ModelSizes, tiers: Tiers) -> bool:
    """Whether plain vLLM can keep the whole model in fast memory."""
    return sizes.expert_bytes <= tiers.room_bytes


def describe(tiers: Tiers) -> str:
    """The terms of fast memory, for a person."""
    return (
        f"of {size_text(tiers.fast_bytes)} {tiers.fast_name} vLLM uses {size_text(tiers.usable_bytes)}: "
        f"{size_text(tiers.dense_bytes)} dense weights, {size_text(tiers.kv_cache_bytes)} KV cache, "
        f"{size_text(tiers.working_bytes)} "
        f"{'activations and graphs' if tiers.fast_name == 'VRAM' else 'processes'}"
    )


def _needs(sizes: ModelSizes) -> WindowNeeds:
    layers = sizes.layers
    return WindowNeeds(
        (rounded(sizes.record_bytes),),
        tuple(layer.experts for layer in layers),
        tuple(min(sizes.top_k, layer.experts) for layer in layers),
        (1.0,) * len(layers),
    )


def _activations(config: ModelConfig) -> int:
    vocabulary = config.integer("vocab_size", default=0)
    return estimated_activations(
        _BATCHED_TOKENS, 256, config.hidden, config.expert_width, config.top_k, vocabulary, config.number_bytes, True
    )
