"""Sets up what one worker remembers of its requests, and tells it when steps begin and requests end."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..chronicle.background import Background
from ..chronicle.keeper import HistoryKeeper
from ..chronicle.learning import Learning
from ..chronicle.predictors import create_predictor
from ..chronicle.trace_recording import TraceRecording
from ..chronicle.witness import Witness
from ..config import OffloadConfig
from ..errors import UnsupportedError
from ..history.archive import HistoryArchive
from ..history.recording import Recorder
from ..history.trace import Trace
from ..predict.base import ModelShape, Predictor
from ..predict.context import RequestState
from ..predict.history import HistoryPredictor
from ..predict.token_vectors import ModelVectors
from ..prefetch.anticipation import Anticipation
from ..prefetch.estimates import Estimates
from ..runtime import OffloadRuntime
from ..slots.looking_ahead import SlotsAhead
from ..store.reader import Store
from ..store.root import default_root
from .rows import RunnerStep, knows_rows, token_rows

if TYPE_CHECKING:
    from .method import OffloadedMoEMethod

logger = init_logger("vllm.moe_offload")

SECONDS_BETWEEN_ROUNDS = 5.0
MOST_TOKENS = 8192
"""Of one request, the history sees its last so many."""

Layers = Mapping[str, tuple[torch.nn.Module, "OffloadedMoEMethod"]]


class Watch:
    """The witness of one worker's steps, and what becomes of what it sees.

    Raises:
        UnsupportedError: the model's MoE layers differ, so that no trace can hold their maps.
        TraceError: the trace file cannot be written, or holds something else.
    """

    def __init__(
        self,
        vllm_config: Any,
        config: OffloadConfig,
        model: torch.nn.Module,
        layers: Layers,
        runtime: OffloadRuntime,
        cpus: set[int],
    ):
        shape = model_shape(layers)
        self._embeddings = token_rows(model)
        self._trace = _trace_recording(vllm_config, config, shape, runtime.store)
        self._keeper = _history_keeper(vllm_config, config, shape, runtime.store)
        self._vectors = ModelVectors(*self._embeddings) if self._embeddings else None
        self._predictor = self._create_predictor(config, shape)
        self._learning = self._start_learning(cpus)
        anticipation = self._look_ahead(layers, runtime)
        recorder = Recorder(shape, MOST_TOKENS if self._trace is None else None)
        embed = self._embeddings and self._embeddings[0]
        self.witness = Witness(recorder, self._request_ended, embed, anticipation)
        for number, (_, method) in enumerate(layers.values()):
            method.witness, method.number = self.witness, number
        model.register_forward_pre_hook(lambda module, arguments: self.witness.begin_pass())
        self._background = Background(self._round, SECONDS_BETWEEN_ROUNDS, _complain, cpus)

    def _create_predictor(self, config: OffloadConfig, shape: ModelShape) -> Predictor | None:
        if self._keeper is None:
            return None
        return create_predictor(config.predictor, shape, self._keeper.history, self._vectors)

    def _start_learning(self, cpus: set[int]) -> Learning | None:
        if self._keeper is None or not isinstance(self._predictor, HistoryPredictor):
            return None
        keeper, archive = self._keeper, self._keeper.archive
        folder = archive.path(keeper.fingerprint).parent if archive and keeper.writes else None
        return Learning(self._predictor, folder, keeper.fingerprint, self._vectors, cpus, _say)

    def _look_ahead(self, layers: Layers, runtime: OffloadRuntime) -> Anticipation | None:
        """Nothing is looked for ahead where everything is resident."""
        if self._predictor is None or all(method.pooled is None for _, method in layers.values()):
            return None
        pooled = [runtime.layers[name] for name in layers]
        spans = [(layer.pool, layer.span) for layer in pooled]
        slots = SlotsAhead(spans, [_held(layer) for layer, _ in layers.values()])
        record = max(layer.pool.memory.layout.record_bytes for layer in pooled)
        load_seconds = 1e-4 + record / 2e9
        estimates = Estimates(load_seconds, layer_seconds=1e-3, chunk_seconds=load_seconds)
        runtime.anticipation = Anticipation(self._predictor, slots, estimates, time.perf_counter)
        return runtime.anticipation

    def begin_step(self, model_runner: Any, scheduler_output: Any) -> None:
        """A step has been scheduled: some requests ended before it, others run in it."""
        self.witness.end_step()
        self.witness.requests_ended(scheduler_output.finished_req_ids)
        if not scheduler_output.total_num_scheduled_tokens:
            return
        if not knows_rows(model_runner):
            raise UnsupportedError(
                f"moe-offload cannot tell the requests of {type(model_runner).__module__} apart; start with "
                "VLLM_USE_V2_MODEL_RUNNER=0, or with predictor 'none' and without a trace"
            )
        self.witness.begin_step(RunnerStep(model_runner, scheduler_output))

    def close(self) -> None:
        """Write what is to be kept, and end."""
        self._background.close()
        self.witness.end_step()
        self.witness.requests_ended(self.witness.recorder.running)
        if self._learning is not None:
            self._learning.close()
        if self._keeper is not None:
            self._keeper.save(at_once=True)
        if self._trace is not None:
            self._trace.write()

    def _request_ended(self, trace: Trace, state: RequestState | None) -> None:
        if self._trace is not None:
            self._trace.add(trace)
        if self._predictor is not None:
            self._predictor.close(state or self._predictor.open(), trace)
            if not isinstance(self._predictor, HistoryPredictor):
                assert self._keeper is not None
                self._keeper.history.add(trace)

    def _round(self) -> None:
        if self._keeper is not None:
            self._keeper.save()
        if self._learning is not None:
            self._learning.attend()
        if self._trace is not None:
            self._trace.write()


def model_shape(layers: Layers) -> ModelShape:
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


def model_fingerprint(store: Store) -> str:
    """Of the weights and configuration of the model alone: histories outlive another vLLM, kernel or machine."""
    facts = {name: store.identity.facts[name] for name in ("checkpoint", "model")}
    facts["pipeline_stage"] = get_pp_group().rank_in_group if get_pp_group().world_size > 1 else 0
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def writes_files() -> bool:
    """Whether this worker keeps files: ranks that split the same layers all see the same routing."""
    return get_tensor_model_parallel_rank() == 0


def _trace_recording(vllm_config: Any, config: OffloadConfig, shape: ModelShape, store: Store) -> TraceRecording | None:
    if config.trace is None or not writes_files():
        return None
    stage, replica = get_pp_group().rank_in_group, vllm_config.parallel_config.data_parallel_rank
    suffix = "".join(f".{name}{rank}" for name, rank in (("pp", stage), ("dp", replica)) if rank)
    path = config.trace.with_name(f"{config.trace.stem}{suffix}.npz")
    name = Path(vllm_config.model_config.model).name
    logger.info("moe-offload: recording a trace of every request in %s", path)
    return TraceRecording(path, shape, name, model_fingerprint(store))


def _history_keeper(vllm_config: Any, config: OffloadConfig, shape: ModelShape, store: Store) -> HistoryKeeper | None:
    if config.predictor == "none":
        return None
    archive = None if config.history == "off" else HistoryArchive(_history_folder(config))
    first = vllm_config.parallel_config.data_parallel_rank == 0
    keeper = HistoryKeeper(archive, model_fingerprint(store), shape, _warn, first and writes_files())
    logger.info(
        "moe-offload: predicting by '%s', from %d tokens of %d earlier requests",
        config.predictor,
        keeper.history.num_tokens,
        len(keeper.history.requests),
    )
    return keeper


def _history_folder(config: OffloadConfig) -> Path:
    return Path(config.history) if config.history else (config.store or default_root()).parent / "history"


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
