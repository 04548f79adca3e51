"""One worker's fast memory for experts, and the slots it gives each of its models: the daemon's, or of this process.

A worker may load several models: the one it serves and those that draft for it. They share one budget.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_world_group
from vllm.logger import init_logger

from ..cache.sizing import LayoutNeeds, slots_for_budget
from ..client.client import DaemonClient
from ..client.joining import bytes_with_pages, join_daemon, socket_of
from ..config import OffloadConfig
from ..ipc.protocol import Attach
from ..pool import SlotPool, local_pools
from ..pool.memory_limits import Limits, equal_share, memory_limits
from ..sizes import size_text
from ..stats import Stats
from ..store.layout import RecordLayout
from ..store.reader import Store
from ..windows.host_managed import HostManaged
from .cuda.managed import ManagedWindows
from .method import OffloadedLayers

logger = init_logger(__name__)

SPARE_SHARE = 0.9
"""Of the memory that is free when all weights are loaded, this much may become slots and KV cache."""


class LoadedModel(NamedTuple):
    """A model whose store is complete and whose layers have no slots yet."""

    vllm_config: Any
    """What it was loaded with: a drafter has one of its own."""
    name: str
    """Of its checkpoint."""
    module: torch.nn.Module
    store: Store
    layers: OffloadedLayers
    """By their names in the store."""
    built: bool
    """The store: just now, rather than found."""

    def needs(self) -> dict[RecordLayout, LayoutNeeds]:
        """What each of its record layouts asks of its pool."""
        needs: dict[RecordLayout, LayoutNeeds] = {}
        for entry in self.store.layers:
            _, method = self.layers[entry.name]
            top_k = min(method.moe.experts_per_token, entry.experts)
            before = needs.get(entry.layout, LayoutNeeds(entry.layout.payload_bytes, 0, 0))
            needs[entry.layout] = before._replace(
                experts=before.experts + entry.experts, minimum=max(before.minimum, top_k)
            )
        return needs

    @property
    def expert_bytes(self) -> int:
        return sum(entry.layout.payload_bytes * entry.experts for entry in self.store.layers)


class ModelSlots(NamedTuple):
    """The pools of one model."""

    pools: Mapping[str, SlotPool]
    """By layer."""
    stats: Stats
    resident: bool
    """Whether every expert is to stay in the slot of its own number."""
    daemon: DaemonClient | None
    """What keeps the slots in host memory, if not this process."""
    windows: HostManaged | None = None
    """The pools, where slots are in the memory of a device and the host manages them."""
    managed: ManagedWindows | None = None
    """Windows that a device manages by itself, with the pools in host memory behind them."""


class Budget(NamedTuple):
    """Fast memory for the experts of all models of a worker."""

    nbytes: int
    reason: str = ""
    """How ``auto`` came to it, to stand behind the setting."""


def worker_budget(vllm_config: Any, config: OffloadConfig, expert_bytes: int) -> Budget:
    """What ``config.cache`` gives this worker. All workers of an engine must ask for it when they have loaded.

    Args:
        expert_bytes: of all the worker's models.
    """
    if (given := config.budget.given(expert_bytes)) is not None:
        return Budget(given)
    return auto_budget(free_share(), vllm_config.cache_config.kv_cache_memory_bytes)


def auto_budget(free: int, kv_cache: int | None) -> Budget:
    """What ``auto`` makes of free memory.

    Args:
        free: this worker's share, in bytes.
        kv_cache: bytes the KV cache was given; None where vLLM is to size it.
    """
    spare = int(free * SPARE_SHARE)
    chosen = spare // 2 if kv_cache is None else spare - kv_cache
    kept = "half of it" if kv_cache is None else size_text(kv_cache)
    return Budget(max(chosen, 0), f" (auto: {size_text(spare)} to spare, {kept} for the KV cache)")


def slots_of_models(
    vllm_config: Any,
    config: OffloadConfig,
    models: Sequence[LoadedModel],
    budget: Budget,
    io_cpus: set[int],
    setting: str,
) -> list[ModelSlots]:
    """Slots in host memory for every model: the daemon's, or those of this process where it uses none.

    Args:
        vllm_config: the worker's.
        setting: where the budget comes from, for the error.

    Raises:
        ConfigError: the budget is too small, or the daemon that was named cannot be used.
    """
    total = sum(model.expert_bytes for model in models)
    shares = [budget.nbytes * model.expert_bytes // total for model in models]
    with_pages = [bytes_with_pages(share, model.store) for share, model in zip(shares, models, strict=True)]
    daemon_bytes = vllm_config.parallel_config.world_size * sum(with_pages)
    stats = [Stats() for _ in models]
    daemons = [
        attach_to_daemon(
            vllm_config,
            config,
            model.store,
            shares[number],
            budget.nbytes >= total,
            [need.minimum for need in model.needs().values()],
            io_cpus,
            stats[number],
            number,
            daemon_bytes,
        )
        for number, model in enumerate(models)
    ]
    own = [number for number, daemon in enumerate(daemons) if daemon is None]
    needs = {(number, layout): need for number in own for layout, need in models[number].needs().items()}
    slots = slots_for_budget(needs, sum(shares[number] for number in own), f"{setting}{budget.reason}")
    found = []
    for number, (model, daemon) in enumerate(zip(models, daemons, strict=True)):
        if daemon is not None:
            found.append(ModelSlots(daemon.pools, stats[number], daemon.lease, daemon))
            continue
        of_model = {layout: count for (owner, layout), count in slots.items() if owner == number}
        resident = all(count == needs[number, layout].experts for layout, count in of_model.items())
        pools = local_pools(model.store, of_model, config.policy, io_cpus)
        found.append(ModelSlots(pools, stats[number], resident, None))
    return found


def free_share() -> int:
    """Bytes of host memory this worker may take. Returns when every worker has asked, before any of them takes some."""
    return equal_share(_limits_of_all_workers(), get_world_group().rank_in_group)


def _limits_of_all_workers() -> list[Limits]:
    """By rank."""
    group = get_world_group()
    limits: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(limits, memory_limits(), group=group.cpu_group)
    return limits


def attach_to_daemon(
    vllm_config: Any,
    config: OffloadConfig,
    store: Store,
    wanted_bytes: int,
    wants_all: bool,
    least_slots: list[int],
    io_cpus: set[int],
    stats: Stats,
    model: int,
    daemon_bytes: int,
) -> DaemonClient | None:
    """The daemon that ``config.daemon`` asks for, or None where this worker keeps its own slots.

    Args:
        wanted_bytes: fast memory this worker would use for experts of this model.
        wants_all: whether that is every expert, so that the layers may rely on all being there.
        least_slots: per record layout, how many experts a single token needs.
        model: number of the model among those of this worker, the same for every rank.
        daemon_bytes: size of a daemon that is started: what all models of all workers want.

    Raises:
        ConfigError: the daemon that was named does not answer, will not serve this model, or could not be started.
    """
    request = Attach(
        store=store.path.name,
        pid=os.getpid(),
        wanted_bytes=wanted_bytes,
        lease=wants_all,
        group=f"{vllm_config.instance_id}.{vllm_config.parallel_config.data_parallel_rank}.{model}",
        rank=get_tensor_model_parallel_rank(),
        least_slots=least_slots,
    )
    client = join_daemon(config.daemon, request, store, config.policy, daemon_bytes, io_cpus, stats)
    if client is not None:
        logger.info("experts are kept by the daemon (pid %d) at %s", client.daemon_pid, client.path)
        if "policy" in config.model_fields_set and config.daemon != "start":
            logger.info(
                "policy = %r is used while there is no daemon; the daemon evicts by its own --policy",
                config.policy,
            )
    return client


def daemon_socket(config: OffloadConfig) -> Path:
    """Where the daemon of these settings serves."""
    return socket_of(config.daemon)


def predicts_on_other_rank(vllm_config: Any) -> bool:
    """Whether what this worker will need is predicted by a rank that splits the same experts with it.

    What that rank asks the daemon to prefetch, the daemon prefetches for all of its group.
    """
    return get_tensor_model_parallel_rank() > 0 and not vllm_config.parallel_config.enable_expert_parallel
