"""A loaded model and the runtime that serves its experts, as one worker holds them."""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger
from vllm.platforms import current_platform

from ..client.remote_pool import slots_taken_back
from ..config import OffloadConfig
from ..errors import StoreError
from ..pool import HostPool
from ..pool.loader import DamagedRecordError
from ..report import Prediction, Residency
from ..runtime import OffloadRuntime
from ..sizes import size_text
from ..stats import WORKER_STATISTICS
from ..store.root import StoreRoot
from ..threads import failed_threads
from ..windows.pool import WindowPool
from .batch import StepBatch
from .faces import attach_slots, attach_windows
from .failures import StepFailures
from .method import OffloadedMoEMethod
from .placement import LoadedModel, ModelSlots, daemon_socket, predicts_on_other_rank
from .report import ChunkReport

if TYPE_CHECKING:
    from .history import RoutingHistory

logger = init_logger(__name__)

GRAPH_KEY = "moe_offload_graph"
"""Key of ``additional_config`` that is only hashed, never read."""


class ServedModel:
    """Puts slots in place of every layer's experts, and connects their runtime with the rest of the integration.

    Args:
        config: of this model: a drafter's has neither history nor prediction.
        drafts: whether it drafts for another model, so that the rows of its passes are not those of a step.
    """

    def __init__(self, model: LoadedModel, config: OffloadConfig, slots: ModelSlots, io_cpus: set[int], drafts: bool):
        self.name, self.drafts = model.name, drafts
        self._vllm_config = model.vllm_config
        self._expert_bytes = model.expert_bytes
        self._daemon = slots.daemon
        self._resident = slots.resident
        self._windows = slots.windows
        self._managed = slots.managed
        self.runtime = OffloadRuntime(model.store, slots.pools, slots.stats, slots.windows or slots.daemon)
        if self._managed is not None:
            self._managed.serve_for(self.runtime)
        for name, (layer, method) in model.layers.items():
            self._attach(name, layer, method)
        if self._resident or self._managed is not None:
            self._load_everything()
        mark_graph(self._vllm_config, self._resident, self._slots_of_pools())
        self._step: tuple[StepBatch, StepFailures] | None = None
        """The step whose forward pass is running."""
        self._closed = False
        self.predictor = config.predictor
        self._unpredicted = ""
        """Why nothing is to be predicted."""
        self._history = self._build_prediction(model, config, io_cpus)
        self._chunks = ChunkReport(self.runtime.stats, self._vllm_config.scheduler_config.max_num_batched_tokens)
        if not model.store.direct:
            logger.warning(
                "the file system of %s has no O_DIRECT: records are read through a bounded buffered path",
                model.store.path,
            )

    @property
    def summary(self) -> str:
        """Its experts in slots, for the log."""
        slots, slot_bytes = self._slots
        resident, every = size_text(slot_bytes), size_text(self._expert_bytes)
        where = " (all resident)" if self._resident else ""
        if self._windows is not None:
            behind = "" if self._resident else f", over {size_text(self._windows.host_bytes)} of host memory"
            where = f" of the device{behind}{where}"
        elif self._managed is not None:
            where = " of the device, over host memory with all experts"
        return f"{resident} of {every} of experts in {slots} slots{where}, store {self.runtime.store.path}"

    @property
    def _slots(self) -> tuple[int, int]:
        """That kernels compute with: how many, and their bytes."""
        slots = self.runtime if self._managed is None else self._managed
        return slots.slots, slots.slot_bytes

    @property
    def leased(self) -> bool:
        """Whether layers compute on slots that a daemon has promised to leave alone, without looking."""
        return self._daemon is not None and self._daemon.lease and self._windows is None

    def begin_step(self, batch: StepBatch, failures: StepFailures) -> None:
        """A step has been scheduled. Where it has no tokens, it only says which requests have ended."""
        if batch.tokens:
            self._step = batch, failures
            self._chunks.begin_step(batch.tokens)
        if self._managed is not None:
            self._managed.end_step()
        self.runtime.begin_step(batch)
        if self._managed is not None:
            self._managed.begin_step(batch)

    def begin_pass(self) -> None:
        """The batch of a step has been put together; its pass is launched next, as kernels or as a graph."""
        if self._managed is not None:
            self._managed.begin_pass()

    def end_step(self) -> None:
        """The forward pass of the served model is over; passes of a drafter belong to the step that they follow."""
        if self.drafts:
            return
        self._chunks.end_step()
        step, self._step = self._step, None
        if step is not None and self._daemon is not None and self._daemon.lease_lost:
            batch, failures = step
            failures.add(batch.scheduled, str(slots_taken_back()))
        self.runtime.end_step()
        if self._managed is not None:
            self._managed.end_step()

    def close(self) -> None:
        """The worker ends: write what is to be kept, end the threads, let go of the store. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.runtime.end_step()
        if self.runtime.tracer is not None:
            self.runtime.end_requests(self.runtime.tracer.running)
        try:
            if self._managed is not None:
                self._managed.close()
        finally:
            if self._history is not None:
                self._history.close()
                self._history = None
        if self._windows is not None:
            self._windows.close()
        if self._daemon is not None:
            self._daemon.close()
        self.runtime.close()

    def report_failures(self) -> None:
        """Fail the requests of the running step that the layer just computed could not serve.

        Outside of a step there are none: a warm-up pass serves no request. Of a drafter's all requests fail.

        Raises:
            SystemExit: the other ranks cannot be reached.
        """
        failures, rows = self.runtime.take_failures()
        for failure in failures:
            if isinstance(failure, DamagedRecordError):
                self._set_aside(str(failure))
                break
        if self._step is not None:
            batch, step_failures = self._step
            requests = batch.scheduled if self.drafts else batch.requests_of(rows)
            step_failures.add(requests, str(failures[0]))

    def untouched_bytes(self) -> int:
        """Slot memory that has not been taken from the system yet by this process. A device's is taken at once."""
        if self._daemon is not None or self._windows is not None or self._managed is not None:
            return 0
        return max(0, self.runtime.slot_bytes - self.runtime.stats.loaded_bytes)

    def stats(self) -> dict[str, int | float]:
        """The worker's statistics, up to date, and the process id of the daemon that keeps its slots (0: none does)."""
        return self.measured() | {"daemon_pid": self.daemon_pid or 0}

    def measured(self) -> dict[str, int | float]:
        """The worker's statistics, up to date."""
        self._measure()
        return self.runtime.stats.as_dict(WORKER_STATISTICS)

    @property
    def daemon_pid(self) -> int | None:
        """Process id of the daemon that keeps the slots, 0 while it is away; None where this process keeps them."""
        return None if self._daemon is None else self._daemon.daemon_pid

    def prediction_state(self) -> tuple[Prediction, str]:
        """Whether experts are predicted now, and why they are not."""
        prefetcher = self.runtime.prefetcher if self._managed is None else self._managed.prefetcher
        if prefetcher is None:
            return Prediction.OFF, self._unpredicted
        if self._history is not None and self._managed is not None and not self._history.has_learned:
            return Prediction.OFF, "too little has been served to learn from"
        if prefetcher.switch.off:
            return Prediction.OFF, "it was switched off by an error, which the log has"
        if prefetcher.has_paused:
            return Prediction.PAUSED, "it has not paid lately"
        return Prediction.ON, ""

    def residency(self, experts: int) -> NDArray[np.uint8] | None:
        """``[layers, experts]``, see ``report.Residency``; None where a device decides."""
        if self._managed is not None:
            return None
        layers = self.runtime.layers.values()
        residency = np.zeros((len(layers), experts), dtype=np.uint8)
        for row, layer in zip(residency, layers, strict=True):
            row[: layer.experts] = layer.pool.residency(layer.span)
        return residency

    def _measure(self) -> None:
        """Bring the gauges among the statistics up to date."""
        stats = self.runtime.stats
        stats.layers = len(self.runtime.layers)
        stats.experts = sum(layer.experts for layer in self.runtime.layers.values())
        stats.expert_bytes = self._expert_bytes
        stats.device_managed_layers = 0 if self._managed is None else len(self._managed.layers)
        stats.slots, stats.slot_bytes = self._slots
        stats.failed_threads = len(failed_threads())
        if self._managed is None:
            residency = [layer.pool.residency(layer.span) for layer in self.runtime.layers.values()]
            stats.resident_experts = sum(int(np.count_nonzero(layer)) for layer in residency)
            stats.pinned_slots = sum(int(np.count_nonzero(layer == Residency.PINNED)) for layer in residency)
        if self._history is not None:
            self._history.measure(stats)

    def _load_everything(self) -> None:
        try:
            self.runtime.load_everything()
        except DamagedRecordError as damage:
            self._set_aside(str(damage))
            raise
        if self._windows is not None:
            self._windows.close()

    def _slots_of_pools(self) -> list[int]:
        """What the shapes of layers follow from: of host memory, or of each layer's window."""
        if self._managed is not None:
            return [layer.window.slots for layer in self._managed.layers]
        return [
            pool.memory.slots if isinstance(pool, HostPool) else pool.capacity
            for pool in dict.fromkeys(layer.pool for layer in self.runtime.layers.values())
        ]

    def _set_aside(self, reason: str) -> None:
        """Make the next start build a store found damaged again."""
        store = self.runtime.store
        try:
            StoreRoot(store.path.parent).set_aside(store, reason)
        except StoreError as error:
            logger.error("store %s is damaged and stays where it is: %s", store.path, error)
        else:
            logger.error("store %s is damaged; the next start builds it again", store.path)

    def _build_prediction(
        self, model: LoadedModel, config: OffloadConfig, io_cpus: set[int]
    ) -> "RoutingHistory | None":
        if config.predictor == "none":
            self._unpredicted = "predictor = 'none'"
        elif self._resident:
            logger.info("every expert is resident: there is nothing to predict, and no history is kept")
            self._unpredicted = "every expert is resident"
            config = config.model_copy(update={"predictor": "none"})
        elif self._daemon is not None and predicts_on_other_rank(model.vllm_config):
            self._unpredicted = "another rank predicts"
            config = config.model_copy(update={"predictor": "none"})
        if config.trace is None and config.predictor == "none":
            return None
        from .prediction import build_prediction  # imports a compiler, which nothing else needs

        socket = None if self._daemon is None else daemon_socket(config)
        return build_prediction(
            model.vllm_config, config, model.module, model.layers, self.runtime, io_cpus, socket, self._managed
        )

    def _attach(self, name: str, layer: torch.nn.Module, method: OffloadedMoEMethod) -> None:
        """Put slots in place of the layer's experts: its own part of the pool if all are resident, else the whole.

        Expert-parallel layers take the pool even then on a CPU: its kernels crash on the choices of other ranks, which
        only ``compute`` takes out.
        """
        pooled = self.runtime.layers[name]
        of_layer = self.runtime.store.layers[pooled.index].tensors
        resident = self._resident and (layer._expert_map is None or not current_platform.is_cpu())
        if self._managed is not None:
            managed = self._managed.layers[pooled.index]
            method.faces = attach_windows(layer, method, managed.memory, managed.member, of_layer)
            method.managed = partial(self._managed.serve, pooled.index)
            method.managed_map = partial(self._managed.expert_map, pooled.index)
            return
        if isinstance(pooled.pool, WindowPool):
            method.faces = attach_windows(layer, method, pooled.pool.memory, pooled.pool.member, of_layer)
        else:
            assert isinstance(pooled.pool, HostPool)
            memory = pooled.pool.memory
            first, count = (pooled.first, pooled.experts) if resident else (0, memory.slots)
            attach_slots(layer, method, memory, first, count, of_layer)
        if not resident:
            method.pooled = (self.runtime, pooled)
            method.report_failures = self.report_failures


def mark_graph(vllm_config: Any, resident: bool, slots: list[int]) -> None:
    """Make vLLM keep the compiled graphs of this configuration apart from those of other numbers of slots.

    Graphs are kept under a hash that includes ``additional_config``, and hold what layers look like: resident ones are
    computed by vLLM, pooled ones by an opaque op, and both hold as many slots as their pool.
    """
    mark = ["resident" if resident else "pooled", *slots]
    vllm_config.additional_config = {**vllm_config.additional_config, GRAPH_KEY: mark}
