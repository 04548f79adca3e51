"""Sets up what one worker remembers of its requests, and tells it when steps begin and requests end."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.logger import init_logger

from ..chronicle.background import Background
from ..chronicle.learning import Learning
from ..chronicle.witness import Witness
from ..config import OffloadConfig
from ..errors import OffloadError, UnsupportedError
from ..history.recording import Recorder
from ..history.trace import Trace
from ..predict.base import ModelShape, Predictor
from ..predict.context import RequestState
from ..predict.gate import GatePredictor
from ..predict.history import HistoryPredictor
from ..predict.registry import predictor_for_engine
from ..predict.token_vectors import ModelVectors
from ..prefetch.anticipation import Anticipation
from ..prefetch.estimates import Estimates
from ..prefetch.loader import CHUNK_BYTES
from ..prefetch.optional import Switch
from ..runtime import OffloadRuntime
from ..slots.looking_ahead import SlotsAhead
from . import seams
from .batch import StepBatch, token_rows
from .embedding import prompt_embedder
from .history import history_fingerprint, history_keeper, trace_recording
from .method import OffloadedLayers

logger = init_logger("vllm.moe_offload")

SECONDS_BETWEEN_ROUNDS = 5.0
MOST_TOKENS = 8192
"""Of one request, the history sees its last so many."""


class Watch:
    """The witness of one worker's steps, and what becomes of what it sees.

    Raises:
        UnsupportedError: the model's MoE layers differ, so that no trace can hold their maps; this engine does not
            say which rows belong to which request; the model's routers cannot be asked.
        ConfigError: the folder of histories cannot be written, or the embedding function not be used.
        TraceError: the trace file cannot be written, or holds something else.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: OffloadConfig,
        model: torch.nn.Module,
        layers: OffloadedLayers,
        runtime: OffloadRuntime,
        cpus: set[int],
        daemon: Path | None,
    ):
        shape = model_shape(layers)
        _refuse_unknown_rows(vllm_config)
        self._runtime = runtime
        self._prediction = Switch(self._stop_predicting)
        gate = _gate_predictor(model, layers, shape, self._prediction) if config.predictor == "gate" else None
        self._embeddings = token_rows(model)
        embed = prompt_embedder(config.embedding, self._embeddings and self._embeddings[0])
        fingerprint = history_fingerprint(runtime.store, embed)
        self._trace = trace_recording(vllm_config, config, shape, fingerprint)
        self._keeper = history_keeper(vllm_config, config, shape, fingerprint, runtime.store, daemon)
        self._vectors = ModelVectors(*self._embeddings) if self._embeddings else None
        self._predictor = gate or self._predictor_for_engine(config, shape)
        self._learning = self._start_learning(cpus)
        anticipation = self._look_ahead(layers, runtime)
        recorder = Recorder(shape, MOST_TOKENS if self._trace is None else None)
        self._recorder, self._warned_of_unsound_tokens = recorder, False
        self._background = Background(self._round, SECONDS_BETWEEN_ROUNDS, _complain, cpus)
        self.witness = Witness(
            recorder,
            self._request_ended,
            embed,
            anticipation,
            later=self._background.soon,
            switch=Switch(self._stop_watching),
        )
        for number, (_, method) in enumerate(layers.values()):
            method.witness, method.number = self.witness, number
        model.register_forward_pre_hook(lambda module, arguments: self.witness.begin_pass())

    def _predictor_for_engine(self, config: OffloadConfig, shape: ModelShape) -> Predictor | None:
        if self._keeper is None:
            return None
        return predictor_for_engine(config.predictor, shape, self._keeper.history, self._vectors)

    def _start_learning(self, cpus: set[int]) -> Learning | None:
        if self._keeper is None or not isinstance(self._predictor, HistoryPredictor):
            return None
        return Learning(self._predictor, self._keeper, self._vectors, cpus, _say)

    def _look_ahead(self, layers: OffloadedLayers, runtime: OffloadRuntime) -> Anticipation | None:
        """Nothing is looked for ahead where everything is resident."""
        if self._predictor is None or all(method.pooled is None for _, method in layers.values()):
            return None
        pooled = [runtime.layers[name] for name in layers]
        spans = [(layer.pool, layer.span) for layer in pooled]
        slots = SlotsAhead(spans, [_held(layer) for layer, _ in layers.values()], self._predictor.shape.experts)
        record = max(layer.pool.memory.layout.record_bytes for layer in pooled)
        load_seconds = 1e-4 + record / 2e9
        in_the_way = load_seconds * min(1.0, CHUNK_BYTES / record)
        estimates = Estimates(load_seconds, layer_seconds=1e-3, chunk_seconds=in_the_way)
        runtime.anticipation = Anticipation(self._predictor, slots, estimates, time.perf_counter, self._prediction)
        return runtime.anticipation

    def _stop_predicting(self, reason: str) -> None:
        self._runtime.counters.prediction_failures += 1
        logger.error("moe-offload: prediction is switched off for this engine: %s", reason)

    def _stop_watching(self, reason: str) -> None:
        self._prediction.off = True
        self._runtime.counters.prediction_failures += 1
        self._recorder.forget()
        logger.error("moe-offload: prediction, history and traces are switched off for this engine: %s", reason)

    def begin_step(self, model_runner: Any, scheduler_output: Any) -> None:
        """A step has been scheduled: some requests ended before it, others run in it."""
        self.witness.end_step()
        self.witness.requests_ended(scheduler_output.finished_req_ids)
        if not scheduler_output.total_num_scheduled_tokens:
            return
        self.witness.begin_step(StepBatch(model_runner, scheduler_output))

    def stats(self) -> dict[str, int]:
        """What is remembered, and how much of it the predictor has learned from."""
        if self._keeper is None:
            return {}
        learned = self._predictor.trained_tokens if isinstance(self._predictor, HistoryPredictor) else 0
        history = self._keeper.history
        return {
            "history_requests": history.num_requests,
            "history_tokens": history.num_tokens,
            "learned_tokens": learned,
            "unsound_tokens": self._recorder.unsound_tokens,
        }

    def close(self) -> None:
        """Write what is to be kept, and end."""
        self.witness.end_step()
        self.witness.requests_ended(self.witness.recorder.running)
        self._background.close()
        if self._learning is not None:
            self._learning.close()
        if self._keeper is not None:
            with _complaining():
                self._keeper.close()
        if self._trace is not None:
            with _complaining():
                self._trace.close()

    def _request_ended(self, trace: Trace, state: RequestState | None) -> None:
        if self._trace is not None:
            self._trace.add(trace)
        if self._predictor is not None:
            self._prediction.guard(self._learn)(self._predictor, trace, state)

    def _learn(self, predictor: Predictor, trace: Trace, state: RequestState | None) -> None:
        predictor.end_request(state or predictor.start_request(), trace)
        if not isinstance(predictor, HistoryPredictor):
            assert self._keeper is not None
            self._keeper.history.add(trace)

    def _round(self) -> None:
        if self._recorder.unsound_tokens and not self._warned_of_unsound_tokens:
            self._warned_of_unsound_tokens = True
            _warn(
                "tokens are left out of history and trace, because a router gave weights that are not finite, negative "
                "or all zero, or an expert that is none (counted as unsound_tokens)"
            )
        if self._keeper is not None:
            self._keeper.save()
        if self._learning is not None:
            self._learning.attend()
        if self._trace is not None:
            self._trace.write()


def watch_if_possible(
    vllm_config: Any,
    config: OffloadConfig,
    model: torch.nn.Module,
    layers: OffloadedLayers,
    runtime: OffloadRuntime,
    cpus: set[int],
    daemon: Path | None,
) -> Watch | None:
    """The watch these settings need; None where it cannot be and nobody insists on it.

    Args:
        cpus: where threads that need not be here may run.
        daemon: socket of the daemon that keeps the experts; None where this worker does.

    Raises what ``Watch`` raises.
    """
    try:
        return Watch(vllm_config, config, model, layers, runtime, cpus, daemon)
    except UnsupportedError as error:
        if config.predictor_is_explicit or config.trace is not None:
            raise
        _warn(f"serving without prediction: {error}")
        return None


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
    if vllm_config.use_v2_model_runner:
        raise UnsupportedError(
            "moe-offload cannot tell the requests of vLLM's V2 model runner apart, which prediction and traces need: "
            "start with VLLM_USE_V2_MODEL_RUNNER=0, or with predictor 'none' and without a trace"
        )


def _gate_predictor(
    model: torch.nn.Module, layers: OffloadedLayers, shape: ModelShape, prediction: Switch
) -> GatePredictor:
    seams.refuse_where_moved(seams.GATE_PREDICTOR)
    from .routers import layer_routers  # leans on what only this predictor needs

    predictor = GatePredictor(shape, layer_routers(model, [layer for layer, _ in layers.values()]))
    for _, method in layers.values():
        method.show = prediction.guard(predictor.see)
    return predictor


@contextmanager
def _complaining() -> Iterator[None]:
    """What cannot be written must not keep an engine from ending."""
    try:
        yield
    except (OSError, OffloadError) as error:
        _complain(error)


def _held(layer: torch.nn.Module) -> NDArray[np.int64] | None:
    """Numbers of the experts this worker holds, in its own order; None for all of them."""
    expert_map = layer._expert_map
    if expert_map is None:
        return None
    own = expert_map.numpy()
    held = np.flatnonzero(own >= 0)
    return held[np.argsort(own[held])]


def _say(sentence: str) -> None:
    logger.info("moe-offload: %s", sentence)


def _warn(sentence: str) -> None:
    logger.warning("moe-offload: %s", sentence)


def _complain(error: Exception) -> None:
    logger.error("moe-offload: %s: %s", type(error).__name__, error)
