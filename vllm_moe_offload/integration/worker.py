"""Everything one worker offloads: the model it serves, and those that draft for it."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..config import ENVIRONMENT_VARIABLE, OffloadConfig
from ..errors import UnsupportedError
from ..threads import processors_for_reading
from . import machine, seams
from .batch import StepBatch
from .cuda.graphs import leave_experts_out_of_graphs
from .engine_config import PREPARE_ONLY, offload_config, only_environment_asks, switch_off
from .failures import StepFailures, connect_ranks
from .header_checks import no_moe_layers
from .loading import WorkerLoading
from .placement import Budget, LoadedModel, ModelSlots, slots_of_models, worker_budget
from .reporter import Reporter
from .serving import ServedModel
from .start_errors import leaving_errors
from .tracing import traces_requests, with_stall
from .weights import protect_weights
from .windows import bytes_of_least, bytes_taken, window_needs, windows_of_worker

logger = init_logger(__name__)


class PreparedStore(NamedTuple):
    """A complete store, as ``prepare`` reports it."""

    path: str
    size: int
    """Bytes."""
    built: bool
    """Just now, rather than found."""


def install() -> None:
    seams.LOAD_WORKER_MODEL.wrap(_offload_what_is_loaded)


def _offload_what_is_loaded(load_model: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        config = offload_config(self.vllm_config)
        if config is None:
            load_model(self, *args, **kwargs)
            return
        # before loading, which may take one rank far longer than another
        failures = connect_ranks(self.vllm_config.scheduler_config.max_num_seqs)
        with leaving_errors(self.vllm_config), WorkerLoading() as loading:
            load_model(self, *args, **kwargs)
            if not loading.models and _without_experts(self.vllm_config):
                switch_off(self.vllm_config)
                return
            refuse_unaccounted(loading.models, self.vllm_config.compilation_config.static_all_moe_layers)
            if PREPARE_ONLY in self.vllm_config.additional_config:
                self.moe_offload_prepared = [_prepared(model) for model in loading.models]
            else:
                self.moe_offload = WorkerOffload(self, config, loading.models, failures)

    return load


def _without_experts(vllm_config: Any) -> bool:
    """Whether a worker without MoE layers serves a model without any; with pipeline stages, others may have them.

    Raises:
        UnsupportedError: it does, and this model was explicitly to be offloaded.
    """
    asked, model = not only_environment_asks(vllm_config), vllm_config.model_config
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and (
        asked or model.is_moe or vllm_config.speculative_config is not None
    ):
        return False
    if asked:
        raise no_moe_layers(model.model)
    if get_tensor_model_parallel_rank() == 0:
        logger.info("%s has no MoE layers: it is served as without %s", model.model, ENVIRONMENT_VARIABLE)
    return True


def refuse_unaccounted(models: Collection[LoadedModel], moe_layers: Collection[str]) -> None:
    """Refuse an engine in which some experts would take memory that no budget counts.

    Args:
        moe_layers: names of all MoE layers that vLLM has made.

    Raises:
        UnsupportedError: naming those that no model's loading has made.
    """
    offloaded = {layer.layer_name for model in models for layer, _ in model.layers.values()}
    resident = [name for name in moe_layers if name not in offloaded]
    if resident:
        raise UnsupportedError(
            f"moe-offload cannot offload {', '.join(resident)}: made by none of vLLM's model loaders, so all of "
            "their experts would stay in memory; switch moe-offload off, or serve without what brings these layers"
        )


def _prepared(model: LoadedModel) -> PreparedStore:
    model.store.close()
    return PreparedStore(str(model.store.path), model.store.data_bytes, model.built)


class WorkerOffload:
    """The offloaded models of one worker, as its steps see them.

    All workers of an engine make this at the same time, those without MoE layers too.

    Args:
        models: those with MoE layers.
        failures: of this worker's steps, connected with the other workers'.

    Raises:
        ConfigError: the budget is too small, or the daemon that was named cannot be used.
    """

    def __init__(self, worker: Any, config: OffloadConfig, models: Sequence[LoadedModel], failures: StepFailures):
        self._failures = failures
        self._traces = traces_requests(worker.vllm_config)
        self.device_slots: tuple[int, int] | None = None
        """Bytes of device memory that slots take, and that the smallest would take; None where there are none."""
        self.warms_up = False
        """Whether the passes that run serve nobody."""
        cpus = processors_for_reading()
        budget, slots = slots_for_worker(worker, config, models, cpus)
        if any(of_model.windows or of_model.managed for of_model in slots):
            needs = window_needs(models)
            self.device_slots = bytes_taken(budget, needs), bytes_of_least(needs)
        target = worker.model_runner.get_model()
        if models and all(model.module is not target for model in models):
            refuse_to_predict(config)
        self._models: list[ServedModel] = []
        for model, of_model in zip(models, slots, strict=True):
            drafts = model.module is not target
            served = ServedModel(model, _of_drafter(config) if drafts else config, of_model, cpus, drafts)
            model.module.moe_offload = served
            protect_weights(model.module)
            self._models.append(served)
            if served.leased:
                failures.announce_late()
        if self._models:
            failures.stats = self._models[0].runtime.stats
        self._reporters = [Reporter(served, worker.vllm_config, cpus) for served in self._models]
        self._log(len(worker.vllm_config.compilation_config.static_all_moe_layers), budget.reason)

    def begin_step(self, batch: StepBatch) -> None:
        """A step has been scheduled. Where it has no tokens, it only says which requests have ended."""
        if batch.tokens:
            self._failures.begin_step(batch.scheduled)
        for model in self._models:
            model.begin_step(batch, self._failures)

    def end_step(self) -> None:
        """The forward pass of the served model is over."""
        for model in self._models:
            model.end_step()
        self._failures.end_step()

    def with_failures(self, output: Any) -> Any:
        """``output`` of the step, with the requests that failed on any rank, and its stall where vLLM traces them."""
        output = self._failures.attach(output)
        if not self._traces:
            return output
        return with_stall(output, sum(model.runtime.activity.last_stall for model in self._models))

    def untouched_bytes(self) -> int:
        """Slot memory that has not been taken from the system yet by this process."""
        return sum(model.untouched_bytes() for model in self._models)

    def stats(self) -> dict[str, int | float]:
        """Stats and sizes of the served model; those of a drafter, if it has MoE layers, begin with ``drafter_``."""
        stats: dict[str, int | float] = {}
        for model in self._models:
            for name, value in model.stats().items():
                key = f"drafter_{name}" if model.drafts else name
                stats[key] = stats.get(key, 0) + value
        return stats

    def close(self) -> None:
        """The worker ends: write what is to be kept, end the threads, let go of the stores. Idempotent."""
        while self._reporters:
            self._reporters.pop().close()
        for model in self._models:
            model.close()

    def _log(self, moe_layers: int, budget: str) -> None:
        if not self._models:
            return
        offloaded = sum(len(model.runtime.layers) for model in self._models)
        summaries = [model.summary for model in self._models]
        if len(summaries) > 1:
            summaries = [f"{model.name} {summary}" for model, summary in zip(self._models, summaries, strict=True)]
        logger.info("offloading %d of %d MoE layers: %s%s", offloaded, moe_layers, "; ".join(summaries), budget)


def slots_for_worker(
    worker: Any, config: OffloadConfig, models: Sequence[LoadedModel], cpus: set[int]
) -> tuple[Budget, list[ModelSlots]]:
    """Slots for every model, in the memory that kernels of this worker compute on.

    Raises:
        ConfigError: the budget is too small, or the daemon that was named cannot be used.
    """
    device = machine.device()
    if device is not None:
        budget, slots = windows_of_worker(device, worker, config, models, cpus)
        if not all(of_model.resident or of_model.managed for of_model in slots):
            leave_experts_out_of_graphs(worker.vllm_config)
        return budget, slots
    vllm_config = worker.vllm_config
    budget = worker_budget(vllm_config, config, sum(model.expert_bytes for model in models))
    return budget, slots_of_models(vllm_config, config, models, budget, cpus, f"cache = {config.cache!r}")


def refuse_to_predict(config: OffloadConfig) -> None:
    """Raises ``UnsupportedError`` where a trace or prediction was asked for and the served model has no MoE layers."""
    if config.trace is not None or (config.predictor_is_explicit and config.predictor != "none"):
        raise UnsupportedError(
            "only the drafter has MoE layers here, and traces and prediction are of the served model alone; "
            "leave out trace and predictor"
        )


def _of_drafter(config: OffloadConfig) -> OffloadConfig:
    """History, traces and prediction are of the model whose tokens are served alone."""
    return config.model_copy(update={"predictor": "none", "trace": None})
