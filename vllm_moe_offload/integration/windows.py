"""A worker's slots in the memory of its device: what the budget gives each model, and the host memory behind them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logger import init_logger

from ..config import OffloadConfig
from ..device import Device, OutOfDeviceMemoryError
from ..errors import ConfigError
from ..pool import HostPool, local_pools
from ..sizes import size_setting, size_text
from ..stats import Stats
from ..store.layout import RecordLayout
from ..store.pools import pools_of
from ..windows.host_managed import HostManaged
from ..windows.plan import WindowPlan
from ..windows.sizes import WindowNeeds, bytes_of_everything, plans_for_budget
from .cuda.memory import automatic_reason, automatic_slots, device_memory, wanted_sequences
from .placement import SPARE_SHARE, Budget, LoadedModel, ModelSlots, free_share, slots_of_models

logger = init_logger(__name__)

_PASSING_SLOTS = 16
"""Of host memory, through which experts pass that all stay on the device."""

Needs = dict[tuple[int, RecordLayout], WindowNeeds]
Plans = Mapping[RecordLayout, WindowPlan]


def window_needs(models: Sequence[LoadedModel]) -> Needs:
    """What each record layout of each model, by its number, asks of device memory: equal windows for equal layers."""
    needs: Needs = {}
    for number, model in enumerate(models):
        for members in pools_of(model.store.layers):
            methods = [model.layers[model.store.layers[index].name][1] for index in members.layers]
            needs[number, members.layout] = WindowNeeds(
                tuple(part.nbytes for part in members.layout.components),
                members.counts,
                tuple(
                    min(method.moe.experts_per_token, experts)
                    for method, experts in zip(methods, members.counts, strict=True)
                ),
                tuple(map(float, members.counts)),
            )
    return needs


def device_budget(worker: Any, config: OffloadConfig, models: Sequence[LoadedModel], needs: Needs) -> Budget:
    """What ``config.cache`` gives this worker of its device's memory.

    Args:
        needs: of the models.

    Raises:
        ConfigError: ``auto`` finds no room.
    """
    everything = bytes_of_everything(needs)
    if config.budget.size is not None:
        return Budget(config.budget.size)
    if config.budget.share is not None:
        return Budget(math.ceil(everything * config.budget.share))
    least = sum(need.plan(need.minimum).nbytes(need.row_bytes) for need in needs.values())
    layer, _ = next(iter(models[0].layers.values()))
    memory = device_memory(worker, layer)
    slots = automatic_slots(memory, wanted_sequences(worker), least, everything)
    return Budget(slots.nbytes, automatic_reason(memory, slots.sequences))


def host_budget(config: OffloadConfig, expert_bytes: int, free: int) -> Budget:
    """What ``config.host_cache`` gives this worker of host memory.

    Args:
        expert_bytes: of all models whose experts are not all on the device.
        free: bytes that this worker may take, for ``auto``.
    """
    if config.host_budget.share is not None:
        return Budget(math.ceil(expert_bytes * config.host_budget.share))
    if config.host_budget.size is not None:
        return Budget(config.host_budget.size)
    spare = int(free * SPARE_SHARE)
    return Budget(min(expert_bytes, spare), f" (auto: {size_text(spare)} to spare)")


def windows_of_worker(
    device: Device, worker: Any, config: OffloadConfig, models: Sequence[LoadedModel], io_cpus: set[int]
) -> tuple[Budget, list[ModelSlots]]:
    """Windows for every model, over host memory of the daemon or of this process, and the budget they come from.

    All workers of an engine must ask together, those without MoE layers too.

    Raises:
        ConfigError: the device's or the host's memory does not suffice, or the daemon that was named cannot be used.
    """
    free = free_share()
    if not models:
        return Budget(0), []
    needs = window_needs(models)
    budget = device_budget(worker, config, models, needs)
    plans = plans_for_budget(needs, budget.nbytes, f"{config.cache!r}{budget.reason}")
    of_models: list[Plans] = [
        {layout: plan for (owner, layout), plan in plans.items() if owner == number} for number in range(len(models))
    ]
    pooled = [number for number, plans in enumerate(of_models) if not _resident(plans)]
    behind = {number: _passing(model, config, io_cpus) for number, model in enumerate(models) if number not in pooled}
    if pooled:
        some = [models[number] for number in pooled]
        host = host_budget(config, sum(model.expert_bytes for model in some), free)
        setting = f"host_cache = {config.host_cache!r}"
        behind |= zip(pooled, slots_of_models(worker.vllm_config, config, some, host, io_cpus, setting), strict=True)
    return budget, [
        _over_host_memory(device, config, model, of_models[number], behind[number], budget)
        for number, model in enumerate(models)
    ]


def _resident(plans: Plans) -> bool:
    return all(plan.slots == plan.experts for plan in plans.values())


def _passing(model: LoadedModel, config: OffloadConfig, io_cpus: set[int]) -> ModelSlots:
    """A little host memory, through which all experts of a model come to the device once."""
    slots = {layout: min(need.experts, _PASSING_SLOTS) for layout, need in model.needs().items()}
    return ModelSlots(local_pools(model.store, slots, config.policy, io_cpus), Stats(), True, None)


def _over_host_memory(
    device: Device, config: OffloadConfig, model: LoadedModel, plans: Plans, behind: ModelSlots, budget: Budget
) -> ModelSlots:
    host = {name: pool for name, pool in behind.pools.items() if isinstance(pool, HostPool)}
    try:
        windows = HostManaged(device, model.store.layers, plans, host, config.policy, behind.daemon)
    except OutOfDeviceMemoryError as error:
        raise ConfigError(
            f"cache = {config.cache!r}{budget.reason} takes {size_text(budget.nbytes)} of device memory, which is not "
            f"free: {error}; the largest that is certain to fit is '{size_setting(error.free)}'"
        ) from error
    if windows.unregistered:
        logger.warning(
            "the GPU cannot read host memory where it lies (%s): every record is copied "
            "once more on its way, and none is copied ahead",
            windows.unregistered,
        )
    return behind._replace(pools=windows.pools, resident=_resident(plans), windows=windows)
