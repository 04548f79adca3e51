"""Sets up what one worker remembers of its requests, and tells it when steps begin and requests end."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..chronicle.background import Background
from ..chronicle.trace_recording import TraceRecording
from ..chronicle.witness import Witness
from ..config import OffloadConfig
from ..errors import UnsupportedError
from ..history.recording import Recorder
from ..history.trace import Trace
from ..predict.base import ModelShape
from ..store.reader import Store
from .rows import RunnerStep, knows_rows, token_rows

if TYPE_CHECKING:
    from .method import OffloadedMoEMethod

logger = init_logger("vllm.moe_offload")

SECONDS_BETWEEN_WRITES = 60.0

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
        store: Store,
        cpus: set[int],
    ):
        shape = model_shape(layers)
        self._trace = _trace_recording(vllm_config, config, shape, store)
        found = token_rows(model)
        self.witness = Witness(Recorder(shape), self._request_ended, found[0] if found else None)
        for number, (_, method) in enumerate(layers.values()):
            method.witness, method.number = self.witness, number
        model.register_forward_pre_hook(lambda module, arguments: self.witness.begin_pass())
        self._background = Background(self._write, SECONDS_BETWEEN_WRITES, _complain, cpus)

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
        if self._trace is not None:
            self._trace.write(self.witness.running())

    def _request_ended(self, request: str, trace: Trace) -> None:
        if self._trace is not None:
            self._trace.add(trace)

    def _write(self) -> None:
        if self._trace is not None:
            self._trace.write([])


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


def _complain(error: Exception) -> None:
    logger.error("moe-offload: %s: %s", type(error).__name__, error)
