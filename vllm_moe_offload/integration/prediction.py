"""Sets up for one worker what its settings ask for: prediction, the history that feeds it, and the trace."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from ..config import OffloadConfig
from ..errors import UnsupportedError
from ..learning.supervisor import LearningSupervisor
from ..pool.loader import CHUNK_BYTES
from ..predict.base import ModelShape, Predictor
from ..predict.gate import GatePredictor
from ..predict.history import HistoryPredictor
from ..predict.network import NetworkSize
from ..predict.registry import predictor_for_engine
from ..predict.token_vectors import ModelVectors
from ..prefetch.device_prefetcher import DevicePrefetcher
from ..prefetch.optional import Switch
from ..prefetch.planner import Estimates
from ..prefetch.prefetcher import Prefetcher, PrefetchLayer
from ..runtime import OffloadRuntime, RoutingTracer, WarmStart
from ..stats import Stats
from ..threads import keep_blas_on_one_thread
from ..trace.recorder import Recorder
from ..windows.host_tier import LINK_BYTES_PER_SECOND
from ..windows.pool import WindowPool
from ..windows.speculation import MOST_ROWS
from ..windows.speculative_loads import HeadSizes
from . import relied_on, seams
from .cuda.managed import ManagedWindows
from .embedding import prompt_embedder, token_rows
from .history import RoutingHistory, history_fingerprint, persistent_history, trace_recording
from .method import OffloadedLayers

logger = init_logger(__name__)

MOST_TOKENS = 8192
"""Of one request, the history sees its last so many."""


def build_prediction(
    vllm_config: Any,
    config: OffloadConfig,
    model: torch.nn.Module,
    layers: OffloadedLayers,
    runtime: OffloadRuntime,
    cpus: set[int],
    daemon: Path | None,
    managed: ManagedWindows | None = None,
) -> RoutingHistory | None:
    """Have ``runtime`` trace its steps and prefetch, as these settings ask for. Returns what becomes of the traces.

    None, and nothing else is done, where it cannot be and was not asked for explicitly.

    Args:
        cpus: where threads that need not be here may run.
        daemon: socket of the daemon that keeps the experts; None where this worker does.
        managed: windows that a device manages by itself.

    Raises:
        UnsupportedError: the model's MoE layers differ, so that no trace can hold their maps; this engine does not
            say which rows belong to which request; the model's routers cannot be asked.
        ConfigError: the folder of histories cannot be written, or the embedding function not be used.
        TraceError: the trace file cannot be written, or holds something else.
    """
    try:
        return _build(vllm_config, config, model, layers, runtime, cpus, daemon, managed)
    except UnsupportedError as error:
        if config.predictor_is_explicit or config.trace is not None:
            raise
        logger.warning("serving without prediction: %s", error)
        return None


def _build(
    vllm_config: Any,
    config: OffloadConfig,
    model: torch.nn.Module,
    layers: OffloadedLayers,
    runtime: OffloadRuntime,
    cpus: set[int],
    daemon: Path | None,
    managed: ManagedWindows | None,
) -> RoutingHistory:
    shape = model_shape(layers)
    _refuse_unknown_rows(vllm_config)
    switch = Switch(partial(_log_end_of_prediction, runtime.stats))
    gate = _gate_predictor(model, layers, shape, switch) if config.predictor == "gate" else None
    embeddings = token_rows(model)
    embed = prompt_embedder(config.embedding, embeddings and embeddings[0])
    fingerprint = history_fingerprint(runtime.store, embed)
    trace = trace_recording(vllm_config, config, shape, fingerprint)
    kept = persistent_history(vllm_config, config, shape, fingerprint, runtime.store, daemon)
    vectors = ModelVectors(*embeddings) if embeddings else None
    predictor: Predictor | None = gate
    if predictor is None and kept is not None:
        predictor = predictor_for_engine(config.predictor, shape, kept.history, vectors)
    learning = None
    if kept is not None and isinstance(predictor, HistoryPredictor):
        learning = LearningSupervisor(predictor, kept, vectors, cpus)
    if predictor is not None:
        _prefetch(predictor, layers, runtime, switch)
    recorder = Recorder(shape, MOST_TOKENS if trace is None else None)
    history = RoutingHistory(recorder, trace, kept, predictor, learning, switch, cpus)
    stop_all = Switch(partial(_stop_all, runtime.stats, recorder, switch))
    tracer = RoutingTracer(recorder, history.request_ended, embed, history.later, stop_all)
    if runtime.queue is not None:
        runtime.queue.tracer = tracer
        runtime.warm_start = None if kept is None else WarmStart(kept.history, tracer)
        if managed is not None and isinstance(predictor, HistoryPredictor):
            _predict_on_device(predictor, managed, vllm_config.scheduler_config.async_scheduling, switch)
        return history
    runtime.tracer = tracer
    for number, (_, method) in enumerate(layers.values()):
        method.traced = runtime, number
    model.register_forward_pre_hook(lambda module, arguments: runtime.begin_pass())
    return history


def _prefetch(predictor: Predictor, layers: OffloadedLayers, runtime: OffloadRuntime, switch: Switch) -> None:
    """Have ``runtime`` prefetch what ``predictor`` predicts, unless everything is resident."""
    if all(method.pooled is None for _, method in layers.values()):
        return
    keep_blas_on_one_thread()
    pooled = [runtime.layers[name] for name in layers]
    prefetched = [
        PrefetchLayer(layer.pool, layer.span, _held(module), predictor.shape.experts)
        for layer, (module, _) in zip(pooled, layers.values(), strict=True)
    ]
    record = max(layer.pool.layout.record_bytes for layer in pooled)
    in_windows = any(isinstance(layer.pool, WindowPool) for layer in pooled)
    load_seconds = 1e-4 + record / (LINK_BYTES_PER_SECOND if in_windows else 2e9)
    in_the_way = load_seconds * min(1.0, CHUNK_BYTES / record)
    estimates = Estimates(load_seconds, layer_seconds=1e-3, chunk_seconds=in_the_way)
    runtime.prefetcher = Prefetcher(predictor, prefetched, estimates, time.perf_counter, runtime.stats, switch)


def _predict_on_device(
    predictor: HistoryPredictor, managed: ManagedWindows, tokens_come_late: bool, switch: Switch
) -> None:
    keep_blas_on_one_thread()
    size = NetworkSize(predictor.shape.layers, predictor.shape.experts, vector=0)
    device = managed.predict(HeadSizes(size.experts, size.state, size.hidden))
    managed.begin_with(DevicePrefetcher(predictor, device, MOST_ROWS, tokens_come_late, switch))


def _log_end_of_prediction(stats: Stats, reason: str) -> None:
    stats.prediction_failures += 1
    logger.error("prediction is switched off for this engine: %s", reason)


def _stop_all(stats: Stats, recorder: Recorder, prediction: Switch, reason: str) -> None:
    prediction.off = True
    stats.prediction_failures += 1
    recorder.forget()
    logger.error("prediction, history and traces are switched off for this engine: %s", reason)


def model_shape(layers: OffloadedLayers) -> ModelShape:
    """Layers, experts and choices of the model.

    Raises:
        UnsupportedError: its MoE layers are not all alike.
    """
    shapes = {(method.moe.num_logical_experts, method.moe.experts_per_token) for _, method in layers.values()}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"this model's MoE layers differ in experts and choices ({sorted(shapes)}), which prediction and traces "
            "cannot describe; use predictor 'none' and no trace"
        )
    return ModelShape(len(layers), *shapes.pop())


def _refuse_unknown_rows(vllm_config: Any) -> None:
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    reasons = (
        (
            speculative is not None and speculative.enable_adaptive_verification,
            "adaptive verification, which decides on the device how many guesses of a request are verified",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "prefill context parallelism, which parts the rows of a request among ranks",
        ),
    )
    for unknown, feature in reasons:
        if unknown:
            raise UnsupportedError(
                f"moe-offload cannot tell whose the rows of a step are, which prediction and traces need, under "
                f"{feature}: start without it, or with predictor 'none' and without a trace"
            )


def _gate_predictor(
    model: torch.nn.Module, layers: OffloadedLayers, shape: ModelShape, prediction: Switch
) -> GatePredictor:
    seams.refuse_where_moved(relied_on.GATE_PREDICTOR)
    from .routers import layer_routers  # leans on what only this predictor needs

    predictor = GatePredictor(shape, layer_routers(model, [layer for layer, _ in layers.values()]))
    for _, method in layers.values():
        method.show = prediction.guard(predictor.note_router_input)
    return predictor


def _held(layer: torch.nn.Module) -> NDArray[np.int64] | None:
    """Numbers of the experts this worker holds, in its own order; None for all of them."""
    expert_map = layer._expert_map
    if expert_map is None:
        return None
    own = expert_map.cpu().numpy()
    held = np.flatnonzero(own >= 0)
    return held[np.argsort(own[held])]
