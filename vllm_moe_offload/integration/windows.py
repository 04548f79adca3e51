"""A worker's slots in the memory of its device: what the budget gives each model, and the host memory behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

from ..config import OffloadConfig
from ..device import Device, OutOfDeviceMemoryError
from ..device.base import RegistrationError
from ..errors import ConfigError
from ..pool import HostPool, local_pools
from ..sizes import size_setting, size_text
from ..stats import Stats
from ..store.layout import RecordLayout
from ..store.pools import pools_of
from ..windows.host_managed import HostManaged
from ..windows.plan import WindowPlan
from ..windows.sizes import WindowNeeds, bytes_of_everything, plans_for_budget
from . import machine
from .cuda import mode
from .cuda.managed import ManagedWindows, RegisteredRecords
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
    if (given := config.budget.given(everything)) is not None:
        return Budget(given)
    least = bytes_of_least(needs)
    layer, _ = next(iter(models[0].layers.values()))
    memory = device_memory(worker, layer)
    slots = automatic_slots(memory, wanted_sequences(worker), least, everything)
    return Budget(slots.nbytes, automatic_reason(memory, slots.sequences))


def bytes_of_least(needs: Needs) -> int:
    """Device memory without which the choice of one token has no place in some layer."""
    return sum(need.plan(need.minimum).nbytes(need.row_bytes) for need in needs.values())


def bytes_taken(budget: Budget, needs: Needs) -> int:
    """Device memory that windows take of ``budget``, at most."""
    return min(budget.nbytes, bytes_of_everything(needs))


def host_budget(config: OffloadConfig, expert_bytes: int, free: int) -> Budget:
    """What ``config.host_cache`` gives this worker of host memory.

    Args:
        expert_bytes: of all models whose experts are not all on the device.
        free: bytes that this worker may take, for ``auto``.
    """
    if (given := config.host_budget.given(expert_bytes)) is not None:
        return Budget(given)
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
        mode.obstacle_of_any("")
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
    records, own = records_to_manage(device, config, models, behind[pooled[0]]) if pooled else (None, "")
    obstacle = mode.obstacle_of_any(own)
    if pooled:
        mode.log_mode(obstacle, sum(len(models[number].layers) for number in pooled))
    if records is not None and obstacle:
        records.close()
        records = None
    return budget, [
        _over_host_memory(device, worker, config, model, of_models[number], behind[number], budget, records)
        for number, model in enumerate(models)
    ]


def records_to_manage(
    device: Device, config: OffloadConfig, models: Sequence[LoadedModel], behind: ModelSlots
) -> tuple[RegisteredRecords | None, str]:
    """The host memory that ``device`` reads if it manages the windows over it, or None and why it cannot."""
    if len(models) > 1:
        return None, "a drafter has experts too"
    if config.predictor_is_explicit and config.predictor not in mode.PREDICTORS:
        return None, f"predictor = {config.predictor!r} is asked between layers, which takes the host"
    (model,) = models
    if behind.daemon is not None:
        return None, "a daemon keeps the host's memory"
    if len({method.moe.experts_per_token for _, method in model.layers.values()}) > 1:
        return None, "layers choose different numbers of experts for a token"
    experts = sum(entry.experts for entry in model.store.layers)
    host = {name: pool for name, pool in behind.pools.items() if isinstance(pool, HostPool)}
    slots = sum(pool.capacity for pool in dict.fromkeys(host.values()))
    why = mode.obstacle(slots, experts, model.expert_bytes // experts, "")
    if why:
        return None, why
    try:
        return RegisteredRecords(device, model.store.layers, host), ""
    except RegistrationError as refused:
        return None, mode.obstacle(slots, experts, model.expert_bytes // experts, str(refused))


def _resident(plans: Plans) -> bool:
    return all(plan.slots == plan.experts for plan in plans.values())


def _passing(model: LoadedModel, config: OffloadConfig, io_cpus: set[int]) -> ModelSlots:
    """A little host memory, through which all experts of a model come to the device once."""
    slots = {layout: min(need.experts, _PASSING_SLOTS) for layout, need in model.needs().items()}
    return ModelSlots(local_pools(model.store, slots, config.policy, io_cpus), Stats(), True, None)


def _managed(
    device: Device, vllm_config: Any, model: LoadedModel, plans: Plans, records: RegisteredRecords, stats: Stats
) -> ManagedWindows:
    compilation, ranks = vllm_config.compilation_config, vllm_config.parallel_config.tensor_parallel_size
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE)
    captured = (compilation.max_cudagraph_capture_size or 0) if graphs else 0
    rows = max(vllm_config.scheduler_config.max_num_batched_tokens, captured)
    layers = model.store.layers
    maps = [model.layers[entry.name][0]._expert_map for entry in layers]
    record_of = [None if of_layer is None else of_layer.cpu().numpy().astype(np.int32) for of_layer in maps]
    ids = [entry.experts if of is None else len(of) for entry, of in zip(layers, record_of, strict=True)]
    return ManagedWindows(
        device,
        layers,
        plans,
        records,
        machine.managing_kernels(device, max(ids)),
        stats,
        top_k=next(method.moe.experts_per_token for _, method in model.layers.values()),
        most_rows=-(-rows // ranks) * ranks,
        gathered_rows=captured,
        record_of=record_of,
    )


def _over_host_memory(
    device: Device,
    worker: Any,
    config: OffloadConfig,
    model: LoadedModel,
    plans: Plans,
    behind: ModelSlots,
    budget: Budget,
    records: RegisteredRecords | None,
) -> ModelSlots:
    host = {name: pool for name, pool in behind.pools.items() if isinstance(pool, HostPool)}
    try:
        if records is not None:
            managed = _managed(device, worker.vllm_config, model, plans, records, behind.stats)
            return behind._replace(resident=False, managed=managed)
        windows = HostManaged(device, model.store.layers, plans, host, config.policy, behind.daemon)
    except RegistrationError as error:
        raise ConfigError(
            f"the GPU's driver lets this process have no host memory that the GPU reads ({error}): raise the limit on "
            "locked memory (ulimit -l unlimited; in Docker --ulimit memlock=-1; under WSL "
            "VLLM_WSL2_ENABLE_PIN_MEMORY=1), which 'vllm-moe-offload doctor' checks, or switch moe-offload off"
        ) from error
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
