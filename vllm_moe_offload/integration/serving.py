"""A loaded model and the runtime that serves its experts, as one worker holds them."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger

from ..cache.sizing import LayoutNeeds, slots_for_budget
from ..config import ADDITIONAL_CONFIG_KEY, OffloadConfig
from ..daemon.attached_pool import slots_taken_back
from ..devices.memory import available_bytes
from ..errors import LoadError, StoreError
from ..prefetch.loader import DamagedRecordError
from ..runtime import OffloadRuntime
from ..slots import Ledger, embedded_pools
from ..store.layout import RecordLayout
from ..store.reader import Store
from ..store.root import StoreRoot
from ..threads import failed_threads, processors_for_reading
from .hosting import another_rank_foretells, attach_to_daemon, daemon_socket
from .kernel import attach_slots
from .report import StatsReport

if TYPE_CHECKING:
    from .method import OffloadedMoEMethod
    from .watching import Layers, Watch

logger = init_logger("vllm.moe_offload")

SPARE_SHARE = 0.9
"""Of the memory that is free when the dense weights are loaded, this much may become slots and KV cache."""


class ServedModel:
    """Gives every layer its slots, and answers for the runtime to the rest of the integration."""

    def __init__(self, vllm_config: Any, config: OffloadConfig, model: torch.nn.Module, store: Store, layers: "Layers"):
        self._vllm_config = vllm_config
        self._check_layers(store, layers)
        needs = _needs(store, layers)
        self._expert_bytes = sum(need.record_bytes * need.experts for need in needs.values())
        budget, why = self._budget_bytes(config)
        io_cpus = processors_for_reading()
        ledger = Ledger()
        least_slots = [need.minimum for need in needs.values()]
        self._daemon = attach_to_daemon(
            vllm_config, config, store, budget, budget >= self._expert_bytes, least_slots, io_cpus, ledger
        )
        if self._daemon is not None:
            self._resident = self._daemon.lease
            pools = self._daemon.pools
        else:
            slots = slots_for_budget(needs, budget, f"{config.cache!r}{why}")
            self._resident = all(slots[layout] == need.experts for layout, need in needs.items())
            pools = embedded_pools(store, slots, config.policy, io_cpus, ledger)
        self.runtime = OffloadRuntime(store, pools, ledger)
        for layer, method in layers.values():
            self._attach(layer, method)
        if self._resident:
            self._load_everything()
        self._mark_in_config()
        self._step_requests: dict[str, int] = {}
        self._watch: Watch | None = None
        self._closed = False
        if self._resident and config.predictor != "none":
            logger.info("moe-offload: every expert is resident: nothing to predict, and nothing is remembered")
            config = config.model_copy(update={"predictor": "none"})
        if self._daemon is not None and another_rank_foretells(vllm_config):
            config = config.model_copy(update={"predictor": "none"})
        if config.trace is not None or config.predictor != "none":
            from .watching import watch_if_possible  # brings a compiler along, which nobody else needs

            socket = None if self._daemon is None else daemon_socket(config)
            self._watch = watch_if_possible(vllm_config, config, model, layers, self.runtime, io_cpus, socket)
        self._report = StatsReport(self.runtime)
        if not store.direct:
            logger.warning(
                "moe-offload: the file system of %s has no O_DIRECT: records are read through a bounded buffered path",
                store.path,
            )
        logger.info(
            "moe-offload: offloading %d of %d MoE layers: %s of %s GiB of experts in %d slots%s, store %s",
            len(layers),
            len(vllm_config.compilation_config.static_all_moe_layers),
            _gib(self.runtime.resident_bytes),
            _gib(self._expert_bytes),
            self.runtime.slots,
            " (all resident)" if self._resident else why,
            store.path,
        )

    def begin_step(self, model_runner: Any, scheduler_output: Any) -> None:
        """A step has been scheduled. Where it schedules no tokens, it only says which requests have ended."""
        if self._watch is not None:
            self._watch.begin_step(model_runner, scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            self._take_failures()  # of a warm-up pass, which computed nothing for anybody
            self._step_requests = dict(scheduler_output.num_scheduled_tokens)
            if self._daemon is not None:
                self._daemon.begin_step()
            self.runtime.begin_step(scheduler_output.total_num_scheduled_tokens)
            self._report.maybe_log()

    def end_step(self) -> None:
        """The forward pass is over."""
        if self._watch is not None:
            self._watch.witness.end_step()

    def close(self) -> None:
        """The worker ends: write what is to be kept, end the threads, let go of the store. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._daemon is not None:
            self._daemon.close()
        self.runtime.close()

    def failed_requests(self, model_runner: Any) -> dict[str, str]:
        """Requests of the running step that met an expert that could not be read, with the reason."""
        failures, rows = self._take_failures()
        if not failures:
            return {}
        reason = str(failures[0])
        if self._vllm_config.parallel_config.world_size > 1:
            raise failures[0]
        order = getattr(getattr(model_runner, "input_batch", None), "req_ids", None)
        if order is None or set(order) != set(self._step_requests):
            return dict.fromkeys(self._step_requests, reason)
        owner = np.repeat(np.arange(len(order)), [self._step_requests[request] for request in order])
        return {order[index]: reason for index in {int(owner[row]) for row in rows if row < len(owner)}}

    def untouched_bytes(self) -> int:
        """Slot memory that has not been taken from the system yet by this process."""
        if self._daemon is not None:
            return 0
        return max(0, self.runtime.resident_bytes - self.runtime.counters.loaded_bytes)

    def stats(self) -> dict[str, int | float]:
        """The runtime's counters and the sizes of things."""
        return {
            **self.runtime.counters.as_dict(),
            "layers": len(self.runtime.layers),
            "slots": self.runtime.slots,
            "resident_bytes": self.runtime.resident_bytes,
            "expert_bytes": self._expert_bytes,
            "daemon_pid": 0 if self._daemon is None else self._daemon.daemon_pid,
            "failed_threads": len(failed_threads()),
            **({} if self._watch is None else self._watch.stats()),
        }

    def _take_failures(self) -> tuple[list[LoadError], set[int]]:
        failures, rows = self.runtime.take_failures()
        if self._daemon is not None and self._daemon.lease_lost:
            failures.append(slots_taken_back())
            rows.update(range(sum(self._step_requests.values())))
        for failure in failures:
            if isinstance(failure, DamagedRecordError):
                self._set_aside(str(failure))
                break
        return failures, rows

    def _load_everything(self) -> None:
        try:
            self.runtime.load_everything()
        except DamagedRecordError as damage:
            self._set_aside(str(damage))
            raise

    def _set_aside(self, reason: str) -> None:
        """Make the next start build a store found damaged again."""
        store = self.runtime.store
        try:
            StoreRoot(store.path.parent).set_aside(store, reason)
        except StoreError as error:
            logger.error("moe-offload: store %s is damaged and stays where it is: %s", store.path, error)
        else:
            logger.error("moe-offload: store %s is damaged; the next start builds it again", store.path)

    def _attach(self, layer: torch.nn.Module, method: "OffloadedMoEMethod") -> None:
        """Put slots in place of the layer's experts: its own window if all are resident, else the whole pool.

        Expert-parallel layers take the pool even then: CPU kernels crash on the choices of other ranks, which only
        ``compute`` takes out.
        """
        pooled = self.runtime.layers[layer.layer_name]
        memory = pooled.pool.memory
        if self._resident and layer._expert_map is None:
            attach_slots(layer, method, memory, pooled.first, pooled.experts)
        else:
            attach_slots(layer, method, memory, 0, memory.slots)
            method.pooled = (self.runtime, pooled)

    def _budget_bytes(self, config: OffloadConfig) -> tuple[int, str]:
        """Fast memory for experts in bytes, and how ``auto`` came to it."""
        budget = config.budget
        if budget.share is not None:
            return math.ceil(self._expert_bytes * budget.share), ""
        if budget.size is not None:
            return budget.size, ""
        spare = int(available_bytes() * SPARE_SHARE)
        kv_cache = self._vllm_config.cache_config.kv_cache_memory_bytes
        chosen = spare // 2 if kv_cache is None else spare - kv_cache
        kept = "half of it for" if kv_cache is None else f"{_gib(kv_cache)} GiB for"
        return max(chosen, 0), f" (auto: {_gib(spare)} GiB to spare, {kept} the KV cache)"

    def _check_layers(self, store: Store, layers: "Layers") -> None:
        stored = [entry.name for entry in store.layers]
        if set(stored) != set(layers):
            raise StoreError(f"store {store.path} has the layers {stored}, this model has {list(layers)}")

    def _mark_in_config(self) -> None:
        """Resident and pooled layers compile to different graphs, which vLLM keeps under a hash of this dict."""
        settings = self._vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
        slots = sum(pool.memory.slots for pool in self.runtime.pools)
        self._vllm_config.additional_config = {
            **self._vllm_config.additional_config,
            ADDITIONAL_CONFIG_KEY: {**settings, "cache": "100%" if self._resident else f"{slots}B"},
        }


def _needs(store: Store, layers: "Layers") -> dict[RecordLayout, LayoutNeeds]:
    """What each record layout asks of its pool."""
    needs: dict[RecordLayout, LayoutNeeds] = {}
    for entry in store.layers:
        _, method = layers[entry.name]
        top_k = min(method.moe.experts_per_token, entry.experts)
        before = needs.get(entry.layout, LayoutNeeds(entry.layout.payload_bytes, 0, 0))
        needs[entry.layout] = before._replace(
            experts=before.experts + entry.experts, minimum=max(before.minimum, top_k)
        )
    return needs


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}" if size >= 2**30 else f"{size / 2**30:.3f}"
